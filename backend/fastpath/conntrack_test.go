package fastpath

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// entry returns the attributes of a conntrack entry as ctnetlink sends them.
func entry(t *testing.T, c connection) []byte {
	t.Helper()
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	c.original.encode(e)
	reply := netlink.NewAttributeEncoder()
	c.reply.encode(reply)
	b, err := reply.Encode()
	if err != nil {
		t.Fatal(err)
	}
	e.Bytes(ctaTupleReply|unix.NLA_F_NESTED, b[4:]) // what CTA_TUPLE_ORIG contains
	e.Uint32(ctaStatus, c.status)
	e.Nested(ctaProtoInfo, func(e *netlink.AttributeEncoder) error {
		e.Nested(ctaProtoInfoTCP, func(e *netlink.AttributeEncoder) error {
			e.Uint8(ctaTCPState, c.state)
			return nil
		})
		return nil
	})
	if b, err = e.Encode(); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestConntrackEntryIsDecoded(t *testing.T) {
	for name, addresses := range map[string][2]string{"IPv4": {"10.5.1.2:40000", "10.5.2.3:80"}, "IPv6": {"[fd00:5::2]:40000", "[fd00:6::3]:80"}} {
		from, to := netip.MustParseAddrPort(addresses[0]), netip.MustParseAddrPort(addresses[1])
		want := connection{
			status: confirmed | seenReply, state: tcpEstablished,
			original: tuple{unix.IPPROTO_TCP, from, to}, reply: tuple{unix.IPPROTO_TCP, to, from},
		}
		if is, err := decodeConnection(entry(t, want)); err != nil || is != want {
			t.Errorf("%s: %+v, %v, want %+v", name, is, err, want)
		}
	}
}

// TestAdmissible has connections as conntrack describes them: only those that it neither
// changes nor follows packet by packet may bypass it.
func TestAdmissible(t *testing.T) {
	from, to, service := netip.MustParseAddrPort("10.5.1.2:40000"), netip.MustParseAddrPort("10.5.2.3:80"), netip.MustParseAddrPort("10.96.0.1:80")
	const established = seenReply | assured | confirmed
	for name, c := range map[string]struct {
		protocol uint8
		status   uint32
		state    uint8
		answers  netip.AddrPort // the source of replies
		ok       bool
	}{
		"TCP, established":                    {unix.IPPROTO_TCP, established, tcpEstablished, to, true},
		"TCP, no reply yet":                   {unix.IPPROTO_TCP, confirmed, tcpEstablished, to, false},
		"TCP, seen in one direction":          {unix.IPPROTO_TCP, seenReply | confirmed, tcpEstablished, to, false},
		"TCP, FIN seen":                       {unix.IPPROTO_TCP, established, tcpEstablished + 1, to, false},
		"TCP, being deleted":                  {unix.IPPROTO_TCP, established | dying, tcpEstablished, to, false},
		"TCP, not in the table":               {unix.IPPROTO_TCP, seenReply | assured, tcpEstablished, to, false},
		"TCP to a Service":                    {unix.IPPROTO_TCP, established | 1<<5, tcpEstablished, to, false},
		"TCP from a masqueraded pod":          {unix.IPPROTO_TCP, established | 1<<4, tcpEstablished, to, false},
		"TCP, replies from another address":   {unix.IPPROTO_TCP, established, tcpEstablished, service, false},
		"TCP, sequence numbers are adjusted":  {unix.IPPROTO_TCP, established | adjusted, tcpEstablished, to, false},
		"TCP with a helper":                   {unix.IPPROTO_TCP, established | helper, tcpEstablished, to, false},
		"TCP that a helper expected":          {unix.IPPROTO_TCP, established | expected, tcpEstablished, to, false},
		"TCP in a flowtable":                  {unix.IPPROTO_TCP, established | 1<<14, tcpEstablished, to, false},
		"TCP in a hardware flowtable":         {unix.IPPROTO_TCP, established | 1<<15, tcpEstablished, to, false},
		"UDP, answered":                       {unix.IPPROTO_UDP, established, 0, to, true},
		"UDP, not answered":                   {unix.IPPROTO_UDP, confirmed, 0, to, true},
		"UDP, not in the table":               {unix.IPPROTO_UDP, 0, 0, to, false},
		"UDP, being deleted":                  {unix.IPPROTO_UDP, confirmed | dying, 0, to, false},
		"UDP to a Service":                    {unix.IPPROTO_UDP, confirmed | 1<<5, 0, to, false},
		"UDP, replies from another address":   {unix.IPPROTO_UDP, confirmed, 0, service, false},
		"UDP with a helper, such as for TFTP": {unix.IPPROTO_UDP, confirmed | helper, 0, to, false},
	} {
		is := connection{status: c.status, state: c.state, original: tuple{c.protocol, from, to}, reply: tuple{c.protocol, c.answers, from}}
		if err := is.admissible(); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestReasonsMostFrequentFirst(t *testing.T) {
	var r readings
	if why := r.reasons(); why != "no reason is known" {
		t.Error(why)
	}
	r[inPackets], r[slowInECN], r[slowInFlow], r[slowInHeader] = 100, 3, 9, 3
	var order []string
	for _, d := range r.slow() {
		order = append(order, d.Reason)
	}
	if want := []string{"ingress-flow", "ingress-ecn", "ingress-header"}; len(order) != 3 || order[0] != want[0] || order[1] != want[1] || order[2] != want[2] {
		t.Errorf("%v, want %v", order, want)
	}
	if why := r.reasons(); why != "ingress-flow" {
		t.Error(why)
	}
}
