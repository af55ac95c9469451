package report

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/firewall"
	"culvert/internal/host"
)

// kernel returns the kernel state of this network namespace: read directly, and
// as shown by the usual programs, where installed.
func kernel() []Source {
	return []Source{
		listing("links", netlink.LinkList),
		listing("addresses", func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) }),
		listing("routes", func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		}),
		listing("rules", func() ([]netlink.Rule, error) { return netlink.RuleList(netlink.FAMILY_ALL) }),
		listing("neighbours", func() ([]netlink.Neigh, error) { return netlink.NeighList(0, netlink.FAMILY_ALL) }),
		listing("fdb", func() ([]netlink.Neigh, error) { return netlink.NeighList(0, unix.AF_BRIDGE) }),
		listing("nftables", firewall.List),
		{"kernel/sysctl-net.txt", sysctls},
		file("kernel/version.txt", "/proc/version"),
		file("kernel/modules.txt", "/proc/modules"),
		file("kernel/dev.txt", "/proc/thread-self/net/dev"),
		file("kernel/snmp.txt", "/proc/thread-self/net/snmp"),
		file("kernel/snmp6.txt", "/proc/thread-self/net/snmp6"),
		file("kernel/netstat.txt", "/proc/thread-self/net/netstat"),
		file("kernel/softnet.txt", "/proc/thread-self/net/softnet_stat"),
		file("kernel/udp.txt", "/proc/thread-self/net/udp"),
		file("kernel/udp6.txt", "/proc/thread-self/net/udp6"),
		command("programs/ip-link.txt", "ip", "-d", "-s", "link"),
		command("programs/ip-address.txt", "ip", "address"),
		command("programs/ip-route.txt", "ip", "route", "show", "table", "all"),
		command("programs/ip-6-route.txt", "ip", "-6", "route", "show", "table", "all"),
		command("programs/ip-rule.txt", "ip", "rule"),
		command("programs/ip-neighbour.txt", "ip", "-s", "neighbour"),
		command("programs/bridge-fdb.txt", "bridge", "fdb"),
		command("programs/bridge-link.txt", "bridge", "-d", "link"),
		command("programs/nft.txt", "nft", "-a", "list", "ruleset"),
		command("programs/iptables-save.txt", "iptables-save", "-c"),
		command("programs/ip6tables-save.txt", "ip6tables-save", "-c"),
		command("programs/tc-qdisc.txt", "tc", "-s", "qdisc"),
		command("programs/ss.txt", "ss", "-lunp"),
		command("programs/ethtool.txt", "sh", "-c", "for i in /sys/class/net/*; do i=${i##*/}; echo \"# $i\"; ethtool -k \"$i\"; done"),
	}
}

// mostListed limits the lines of one listing.
const mostListed = 20000

// listing is a kernel table, one JSON object per line.
func listing[T any](name string, list func() ([]T, error)) Source {
	return Source{"kernel/" + name + ".jsonl", func(context.Context) ([]byte, error) {
		all, err := host.Retry(list)
		var b bytes.Buffer
		for i, v := range all {
			if i == mostListed {
				fmt.Fprintf(&b, "[and %d more]\n", len(all)-i)
				break
			}
			line, jerr := json.Marshal(v)
			if jerr != nil { // a value that JSON cannot represent
				line = fmt.Appendf(nil, "%+v", v)
			}
			b.Write(line)
			b.WriteByte('\n')
		}
		return b.Bytes(), err
	}}
}

// sysctls reads /proc/sys/net, up to entryMost bytes.
func sysctls(ctx context.Context) ([]byte, error) {
	var b bytes.Buffer
	const root = "/proc/sys/net"
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil // some cannot be read
		}
		if ctx.Err() != nil || b.Len() > entryMost {
			return fs.SkipAll
		}
		if strings.Contains(path, "secret") || strings.HasSuffix(path, "fastopen_key") {
			return nil
		}
		text, err := os.ReadFile(path)
		if err == nil {
			fmt.Fprintf(&b, "%s = %s\n", strings.TrimPrefix(path, "/proc/sys/"), strings.Join(strings.Fields(string(text)), " "))
		}
		return nil
	})
	return b.Bytes(), err
}
