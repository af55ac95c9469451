package encap

import "sync/atomic"

// Reason is why a packet was dropped. Each drop is counted under exactly one
// Reason. The kernel datapath's drop counters (package internal/host) use the same
// names for the same reasons.
type Reason uint8

// The reasons of the sending side (pod to underlay) come first, then those of
// the receiving side.
const (
	Accepted Reason = iota // not a drop

	EgressMalformed   // the device's frame is not a valid IP packet or GSO frame
	EgressNoPeer      // no peer's lease contains the inner destination
	EgressSource      // the inner source is not in this node's subnet
	EgressLinkLocal   // link-local multicast of the kernel's, which has no peer
	EgressTooBig      // longer than the path MTU to the peer
	EgressFull        // the socket buffer is full
	EgressNoBuffers   // the link's queue is full, or the kernel is short of memory
	EgressUnreachable // no route to the peer, or the link is down
	EgressDenied      // denied by the host's firewall or a prohibit route
	EgressSend        // any other error of the send call

	IngressTruncated   // longer than the receive buffer (packet socket: or shorter than the link header)
	IngressShort       // shorter than its headers (packet socket: or not an IPv4 packet of the protocol)
	IngressUncut       // a super-frame that the kernel cannot deliver, or with too many segments
	IngressFragment    // a fragment of an outer packet (packet socket)
	IngressFlags       // VXLAN without the I flag (RFC 7348, section 5)
	IngressVNI         // another overlay's VNI
	IngressStranger    // the outer source is no peer's address
	IngressMAC         // the inner Ethernet destination is not this VTEP
	IngressProtocol    // the inner frame is neither IPv4 nor IPv6
	IngressMalformed   // a length or checksum in the packet is wrong
	IngressSource      // the inner source is not in the sender's subnet
	IngressDestination // the inner destination is not in this node's subnet
	IngressECN         // the outer ECN is CE, the inner Not-ECT (RFC 6040)
	IngressDown        // the tunnel device is down
	IngressNoBuffers   // the kernel is short of memory
	IngressWrite       // the device rejected it

	reasons // number of reasons
)

var reasonNames = [reasons]string{
	"accepted",
	"egress-malformed", "egress-no-peer", "egress-source", "egress-link-local", "egress-too-big", "egress-full",
	"egress-no-buffers", "egress-unreachable", "egress-denied", "egress-send",
	"ingress-truncated", "ingress-short", "ingress-uncut", "ingress-fragment", "ingress-flags", "ingress-vni", "ingress-stranger",
	"ingress-mac", "ingress-protocol", "ingress-malformed", "ingress-source", "ingress-destination",
	"ingress-ecn", "ingress-down", "ingress-no-buffers", "ingress-write",
}

func (r Reason) String() string { return reasonNames[r] }

// Reasons returns all reasons for a drop, sending side first.
func Reasons() []Reason {
	all := make([]Reason, 0, reasons-1)
	for r := Accepted + 1; r < reasons; r++ {
		all = append(all, r)
	}
	return all
}

// Counters are the totals of one direction of the loop, which adds to them once
// per batch. Reading them is safe at any time.
type Counters struct {
	Packets  atomic.Uint64 // inner packets carried, each segment counted
	Bytes    atomic.Uint64 // of inner packets, headers included
	Frames   atomic.Uint64 // device reads or writes; one frame may hold many packets
	Super    atomic.Uint64 // of Frames: those sent whole, as super-frames
	Syscalls atomic.Uint64 // reads, writes, sends and receives, not waits
	Waits    atomic.Uint64 // times that this direction ended a blocking wait
	Drops    [reasons]atomic.Uint64
}

// tally is an increment of Counters, local to one goroutine until publish.
type tally struct {
	packets, bytes, frames, super, syscalls uint64
	drops                                   [reasons]uint64
	dropped                                 bool
}

func (t *tally) drop(r Reason) { t.dropN(r, 1) }

func (t *tally) dropN(r Reason, n int) {
	t.drops[r] += uint64(n)
	t.dropped = true
}

// publish adds the tally to c and resets it.
func (t *tally) publish(c *Counters) {
	c.Packets.Add(t.packets)
	c.Bytes.Add(t.bytes)
	c.Frames.Add(t.frames)
	c.Super.Add(t.super)
	c.Syscalls.Add(t.syscalls)
	if t.dropped {
		for r, n := range t.drops {
			if n != 0 {
				c.Drops[r].Add(n)
			}
		}
		*t = tally{}
		return
	}
	t.packets, t.bytes, t.frames, t.super, t.syscalls = 0, 0, 0, 0, 0
}
