package trace

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
)

// tracefs is the mount point of the kernel's tracing file system.
const tracefs = "/sys/kernel/tracing"

var dropReason = regexp.MustCompile(`kfree_skb: .*location=([A-Za-z0-9_.]+)\S* reason: ([A-Z0-9_]+)`)

// watchDrops enables the tracepoint skb:kfree_skb for IP packets, in a separate instance
// of the trace buffer, until stop is called, which returns the number of dropped packets
// by reason and place. It includes the drops of the whole machine, since the kernel does
// not report the network namespace. It returns nil if the kernel reports no reasons
// (before Linux 5.17) or tracefs is not mounted.
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
		text, _ := os.ReadFile(filepath.Join(dir, "trace")) // if it cannot be read, there are no counts
		_ = os.Remove(dir)
		return dropReasons(text)
	}
}

// dropReasons counts the reasons in a log. It skips packets that were consumed and those
// without a specified reason, most of which were not lost.
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
