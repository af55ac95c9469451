package doctor

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"culvert/internal/host"
)

// capabilities are those that the daemon uses, and what fails without them.
var capabilities = []struct {
	bit  int
	name string
	loss string
	must bool
}{
	{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN", "no device, route or nftables rule can be made", true},
	{unix.CAP_NET_RAW, "CAP_NET_RAW", "no IPIP in userspace, and no `culvert ping`", false},
	{unix.CAP_BPF, "CAP_BPF", "a single queue in userspace, and no fast path", false},
	{unix.CAP_PERFMON, "CAP_PERFMON", "no fast path", false},
}

// privileges checks this process's capabilities; it usually runs as the same
// user as the daemon.
func privileges(_ context.Context, _ Host) (string, []Finding) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return "", []Finding{bad("", "the process's capabilities cannot be read: %v", err)}
	}
	var all []Finding
	for _, c := range capabilities {
		if data[c.bit/32].Effective&(1<<(c.bit%32)) != 0 {
			continue
		}
		if c.must {
			all = append(all, bad("run this as root", "%s is missing: %s", c.name, c.loss))
		} else {
			all = append(all, risk("run this as root", "%s is missing: %s", c.name, c.loss))
		}
	}
	if len(all) > 0 {
		return "", all
	}
	return "CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF, CAP_PERFMON", nil
}

func kernel(_ context.Context, h Host) (string, []Finding) {
	release, old, err := host.Release()
	if err != nil {
		return "", []Finding{bad("", "%v", err)}
	}
	seen := []string{"Linux " + release}
	var all []Finding
	if old != "" {
		all = append(all, bad(host.KernelFix, "%s", old))
	}
	format := "vxlan"
	if h.Status != nil && h.Status.Datapath.WireFormat != "" {
		format = h.Status.Datapath.WireFormat
	}
	tun := unix.Access(h.path("/dev/net/tun"), unix.R_OK|unix.W_OK)
	device := error(nil)
	if format != "host-gw" {
		device = host.Supports(format)
	}
	switch {
	case device == nil && format != "host-gw":
		seen = append(seen, format+" devices")
	case device != nil && tun != nil:
		all = append(all, bad("load the module (`modprobe "+format+"`), or `modprobe tun`",
			"neither datapath can be made: %v, and /dev/net/tun: %v", device, tun))
	case device != nil:
		all = append(all, risk("load the module (`modprobe "+format+"`)", "packets are carried in userspace: %v", device))
	}
	if tun == nil {
		seen = append(seen, "/dev/net/tun")
	}
	return strings.Join(seen, ", "), all
}

// clock checks whether the wall clock is synchronized: certificates are valid
// for a limited time.
func clock(_ context.Context, _ Host) (string, []Finding) {
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	if err != nil {
		return "", []Finding{risk("", "asking whether the clock is synchronised: %v", err)}
	}
	if state == unix.TIME_ERROR || t.Status&unix.STA_UNSYNC != 0 {
		return "", []Finding{risk("run chrony or systemd-timesyncd",
			"nothing synchronises the clock, which shows %s: certificates may seem invalid", time.Now().UTC().Format(time.RFC3339))}
	}
	return "synchronised", nil
}

// number reads a number from a file.
func (h Host) number(path string) (int64, error) {
	b, err := os.ReadFile(h.path(path))
	if err != nil {
		return 0, err
	}
	var n int64
	if _, err := fmt.Sscan(string(bytes.TrimSpace(b)), &n); err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return n, nil
}

// nearlyFull is the fill level of a table above which a burst may fill it.
const nearlyFull = 0.9

// conntrack checks the connection tracking table: if it is full, new
// connections are dropped.
func conntrack(_ context.Context, h Host) (string, []Finding) {
	count, err := h.number("/proc/sys/net/netfilter/nf_conntrack_count")
	if err != nil {
		return "not in use", nil
	}
	most, err := h.number("/proc/sys/net/netfilter/nf_conntrack_max")
	if err != nil || most == 0 {
		return "no limit", nil
	}
	more := setting("net/netfilter/nf_conntrack_max", strconv.FormatInt(4*most, 10))
	fix := more.Command
	switch {
	case count >= most:
		return "", []Finding{bad(fix, "the connection tracking table is full (%d of %d): packets of new connections are dropped", count, most).doing(more)}
	case float64(count) >= nearlyFull*float64(most):
		return "", []Finding{risk(fix, "the connection tracking table is nearly full (%d of %d)", count, most).doing(more)}
	}
	return fmt.Sprintf("%d of %d connections", count, most), nil
}

// neighbours checks the limits of the neighbour tables. The kernel does not
// count permanent entries, which the kernel datapaths create for each peer
// (net/core/neighbour.c, gc_entries), so only pods and links fill them.
func neighbours(_ context.Context, h Host) (string, []Finding) {
	var all []Finding
	var seen []string
	for family, table := range map[string]string{"ipv4": "arp_cache", "ipv6": "ndisc_cache"} {
		most, err := h.number("/proc/sys/net/" + family + "/neigh/default/gc_thresh3")
		if err != nil {
			continue
		}
		used, overflows := h.neighbourStat(table)
		more := setting("net/"+family+"/neigh/default/gc_thresh3", strconv.FormatInt(4*most, 10))
		fix := more.Command
		switch {
		case overflows > 0 && float64(used) >= nearlyFull*float64(most):
			all = append(all, bad(fix, "the %s neighbour table has overflowed %d times (%d of %d entries): new neighbours get no packets", family, overflows, used, most).doing(more))
		case float64(used) >= nearlyFull*float64(most):
			all = append(all, risk(fix, "the %s neighbour table is nearly full (%d of %d entries)", family, used, most).doing(more))
		default:
			seen = append(seen, fmt.Sprintf("%s %d of %d", family, used, most))
		}
	}
	if len(seen)+len(all) == 0 {
		return "the limits are those of the initial network namespace", nil
	}
	return strings.Join(seen, ", "), all
}

// neighbourStat reads /proc/net/stat/{arp,ndisc}_cache: hexadecimal columns,
// one line per CPU. entries is that of the whole table, table_fulls is per CPU.
func (h Host) neighbourStat(table string) (entries, overflows uint64) {
	b, err := os.ReadFile(h.path("/proc/net/stat/" + table))
	if err != nil {
		return 0, 0
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	names := strings.Fields(lines[0])
	for _, line := range lines[1:] {
		for i, field := range strings.Fields(line) {
			var n uint64
			if _, err := fmt.Sscanf(field, "%x", &n); err != nil || i >= len(names) {
				continue
			}
			switch names[i] {
			case "entries":
				entries = n
			case "table_fulls":
				overflows += n
			}
		}
	}
	return entries, overflows
}
