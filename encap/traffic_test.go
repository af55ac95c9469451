package encap

import (
	"net/netip"
	"testing"
	"time"
)

// TestPeerTraffic sends frames between two nodes and compares each node's counters
// per peer with its totals, also after the table is replaced and after a packet with
// a wrong source.
func TestPeerTraffic(t *testing.T) {
	a, b := pairOfNodes(t)
	frames := func() {
		t.Helper()
		a.send(t, vnetHeader{flags: vnetNeedsCsum, csumStart: 20, csumOffset: 16, gsoType: gsoTCP4, gsoSize: 1398}, tcpSpec(20000).partial())
		a.send(t, vnetHeader{}, tcpSpec(100).bytes())
		for packets := 0; packets < 20000/1398+2; {
			v, packet := b.receive(t)
			packets += len(cutAsDevice(t, v, packet))
		}
	}
	agree := func(want uint64) {
		t.Helper()
		same := func() bool {
			out, in := a.loop.Table().Peers()[0].Traffic(), b.loop.Table().Peers()[0].Traffic()
			return out.SentPackets == want && in.ReceivedPackets == want && out.SentBytes == in.ReceivedBytes &&
				out.SentPackets == a.options.Egress.Packets.Load() && out.SentBytes == a.options.Egress.Bytes.Load() && out.ReceivedPackets == 0
		}
		for end := time.Now().Add(5 * time.Second); !same(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("sent %+v, received %+v, in all %d; want %d packets", a.loop.Table().Peers()[0].Traffic(), b.loop.Table().Peers()[0].Traffic(), a.options.Egress.Packets.Load(), want)
			}
		}
	}
	const each = 20000/1398 + 1 + 1
	frames()
	agree(each)
	meet(a, b) // replaces the tables, with the same subnets and addresses
	frames()
	agree(2 * each)

	forged := tcpSpec(10)
	forged.source = netip.MustParseAddr("10.5.3.1")
	a.loop.SetTable(NewTable([]netip.Prefix{a.subnet, netip.MustParsePrefix("10.5.3.0/24")}, a.loop.Table().Peers()))
	a.send(t, vnetHeader{}, forged.bytes())
	for end := time.Now().Add(5 * time.Second); b.loop.Table().Peers()[0].Traffic().Drops != 1; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%+v", b.loop.Table().Peers()[0].Traffic())
		}
	}
}
