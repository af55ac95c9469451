package host

import "github.com/vishvananda/netlink"

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
