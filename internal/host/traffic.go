package host

import (
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
)

// Traffic counts what a device has sent and received.
type Traffic struct {
	SentPackets, SentBytes         uint64
	ReceivedPackets, ReceivedBytes uint64
}

// DeviceTraffic returns the sum of the devices' counters since their creation.
// A missing device counts as zero.
func DeviceTraffic(names ...string) Traffic {
	var t Traffic
	for _, name := range names {
		l, err := netlink.LinkByName(name)
		if err != nil || l.Attrs().Statistics == nil {
			continue
		}
		s := l.Attrs().Statistics
		t.SentPackets += s.TxPackets
		t.SentBytes += s.TxBytes
		t.ReceivedPackets += s.RxPackets
		t.ReceivedBytes += s.RxBytes
	}
	return t
}

// Drops returns the number of packets dropped by culvert's nftables rules, by
// reason, 0 included. The counters restart when the chains are replaced, as when a peer has
// a subnet of a new size.
func Drops(f Firewall) map[string]uint64 {
	t := f.table()
	if t == nil {
		return nil
	}
	c, err := nftables.New()
	if err != nil {
		return nil
	}
	drops := make(map[string]uint64)
	for _, ch := range t.chains {
		reasons := make(map[string]string)
		for _, r := range ch.rules {
			if r.reason != "" {
				reasons[label(r.text)] = r.reason
				drops[r.reason] += 0
			}
		}
		if len(reasons) == 0 {
			continue
		}
		rules, err := c.GetRules(ourTable(), &nftables.Chain{Table: ourTable(), Name: ch.name})
		if err != nil {
			continue
		}
		for _, r := range rules {
			for _, e := range r.Exprs {
				if n, ok := e.(*expr.Counter); ok && reasons[commentText(r.UserData)] != "" {
					drops[reasons[commentText(r.UserData)]] += n.Packets
				}
			}
		}
	}
	return drops
}
