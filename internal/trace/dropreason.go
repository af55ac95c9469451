package trace

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
)

// tracefs is where the kernel tells of dropped packets (tracefs(5)).
const tracefs = "/sys/kernel/tracing"

var dropReason = regexp.MustCompile(`kfree_skb: .*location=([A-Za-z0-9_.]+)\S* reason: ([A-Z0-9_]+)`)

// watchDrops has the kernel note, in an instance of its own of its event log, which
// IP packets it drops and why, until stop, which returns how many for each
// reason and place. Those of the whole machine are in it, since the kernel does
// not say whose they are. Nil where the kernel has no reasons (before Linux 5.17),
// or no tracefs is mounted.
func watchDrops() (stop func() map[string]int) {
	dir := filepath.Join(tracefs, "instances", fmt.Sprintf("culvert_%d", os.Getpid()))
	if os.Mkdir(dir, 0o700) != nil {
		return nil
	}
	event := filepath.Join(dir, "events", "skb", "kfree_skb")
	err := os.WriteFile(filepath.Join(event, "filter"), []byte("protocol == 2048 || protocol == 34525"), 0) // IPv4, IPv6
	if err == nil {
		err = os.WriteFile(filepath.Join(event, "enable"), []byte("1"), 0)
	}
	if err != nil {
		_ = os.Remove(dir)
		return nil
	}
	return func() map[string]int {
		_ = os.WriteFile(filepath.Join(event, "enable"), []byte("0"), 0)
		text, _ := os.ReadFile(filepath.Join(dir, "trace")) // what cannot be read is not known
		_ = os.Remove(dir)
		return dropReasons(text)
	}
}

// dropReasons counts the reasons in a log. A packet that was consumed, or whose
// reason nobody gave, was most often not lost.
func dropReasons(text []byte) map[string]int {
	reasons := make(map[string]int)
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		m := dropReason.FindSubmatch(lines.Bytes())
		if m == nil || string(m[2]) == "NOT_SPECIFIED" || string(m[2]) == "CONSUMED" {
			continue
		}
		reasons[fmt.Sprintf("%s in %s", m[2], m[1])]++
	}
	return reasons
}
