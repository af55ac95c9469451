package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
)

// Counters reads the namespace's counters of the IP protocols (/proc/net/snmp, netstat and
// snmp6), by their names with the protocol's before them, such as TcpRetransSegs,
// TcpExtTCPOFOQueue and Ip6InHdrErrors.
func (n *Namespace) Counters() (map[string]uint64, error) {
	all := make(map[string]uint64)
	set := func(name, value string) {
		v, _ := strconv.ParseInt(value, 10, 64) // some are limits, which may be -1
		all[name] = uint64(v)
	}
	err := n.Do(func() error {
		for _, file := range []string{"snmp", "netstat"} { // pairs of lines, names and values
			text, err := os.ReadFile("/proc/thread-self/net/" + file)
			if err != nil {
				return err
			}
			lines := strings.Split(string(text), "\n")
			for i := 0; i+1 < len(lines); i += 2 {
				names, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
				for k := 1; k < len(names) && k < len(values); k++ {
					set(strings.TrimSuffix(names[0], ":")+names[k], values[k])
				}
			}
		}
		text, err := os.ReadFile("/proc/thread-self/net/snmp6")
		if errors.Is(err, fs.ErrNotExist) { // a kernel without IPv6
			return nil
		}
		for line := range strings.Lines(string(text)) {
			if f := strings.Fields(line); len(f) == 2 {
				set(f[0], f[1])
			}
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading the counters of %s: %w", n.Name, err)
	}
	return all, nil
}
