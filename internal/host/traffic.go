package host

import (
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
)

// Traffic is what a device has carried.
type Traffic struct {
	SentPackets, SentBytes         uint64
	ReceivedPackets, ReceivedBytes uint64
}

// DeviceTraffic returns what the devices carried together since they were made.
// A device that is not there has carried nothing.
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

// Drops returns how many packets culvert's nftables rules have dropped, by
// reason. They count from the making of the chains: a peer with a subnet of a
// size that no other has replaces them.
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
				if n, ok := e.(*expr.Counter); ok && n.Packets > 0 && reasons[commentText(r.UserData)] != "" {
					drops[reasons[commentText(r.UserData)]] += n.Packets
				}
			}
		}
	}
	return drops
}
