package lab

import (
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// lossy are the names of kernel counters that rise where a packet is lost.
var lossy = regexp.MustCompile(`(Errors|Discards|Drops?|Dropped|NoRoutes|Fails|BadSegs|Overflows|QFull|NoPorts)$`)

// Losses reads what the kernel has counted as lost in each namespace of the lab, a line per
// namespace, and on the machine: for the log of a test that misses a packet. A namespace
// that is gone, or has lost nothing, has no line.
func (l *Lab) Losses() []string {
	var lines []string
	for _, n := range l.namespaces() {
		var lost []string
		counters, _ := n.Counters()
		for _, name := range slices.Sorted(maps.Keys(counters)) {
			if counters[name] != 0 && lossy.MatchString(name) {
				lost = append(lost, fmt.Sprintf("%s %d", name, counters[name]))
			}
		}
		_ = n.Do(func() error {
			lost = append(lost, devicesIn(readProc("dev"))...)
			return nil
		})
		if len(lost) > 0 {
			lines = append(lines, n.Name+": "+strings.Join(lost, ", "))
		}
	}
	var full uint64
	for line := range strings.Lines(readProc("softnet_stat")) {
		if f := strings.Fields(line); len(f) > 1 {
			dropped, _ := strconv.ParseUint(f[1], 16, 64)
			full += dropped
		}
	}
	return append(lines, fmt.Sprintf("the machine since its start: %d in full backlogs of CPUs", full))
}

func readProc(name string) string {
	b, _ := os.ReadFile("/proc/thread-self/net/" + name)
	return string(b)
}

// devicesIn returns the errors and drops of each device (/proc/net/dev).
func devicesIn(table string) (lost []string) {
	columns := map[int]string{2: "rx errors", 3: "rx dropped", 10: "tx errors", 11: "tx dropped"}
	for line := range strings.Lines(table) {
		device, values, ok := strings.Cut(line, ":")
		f := strings.Fields(values)
		if !ok || len(f) < 12 {
			continue
		}
		for _, k := range []int{2, 3, 10, 11} {
			if f[k] != "0" {
				lost = append(lost, fmt.Sprintf("%s %s %s", strings.TrimSpace(device), columns[k], f[k]))
			}
		}
	}
	return lost
}
