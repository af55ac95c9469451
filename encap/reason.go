package encap

import "sync/atomic"

// Reason says why a packet was dropped. Every drop is counted under exactly
// one of them. Where the kernel's datapath drops for the same reason
// (internal/host, firewall.go), it has the same name there.
type Reason uint8

// The reasons of the sending side (pod to underlay) come first, then those of
// the receiving side.
const (
	Accepted Reason = iota // not a drop

	EgressMalformed   // the device gave a frame that is no whole IP packet
	EgressNoPeer      // no lease covers the inner destination
	EgressSource      // the inner source is not in this node's subnet
	EgressLinkLocal   // what the kernel says on every link, for no peer
	EgressTooBig      // it does not fit the path to the peer
	EgressFull        // the socket's buffer, and so the link, is full
	EgressNoBuffers   // the link's queue is full, or the kernel is short of memory
	EgressUnreachable // the host has no route to the peer, or its link is down
	EgressDenied      // the host's own firewall or a prohibit route forbids it
	EgressSend        // the kernel refused to send it

	IngressTruncated // longer than any datagram may be
	IngressShort     // shorter than its headers
	IngressUncut     // a super-frame that the kernel cannot hand over, or that has too many segments
	IngressFragment  // a fragment of an IPIP packet
	IngressFlags     // VXLAN without the I flag (RFC 7348, section 5)
	IngressVNI       // another overlay's VNI
	IngressStranger  // the outer source leases nothing
	IngressMAC       // the inner Ethernet destination is not this VTEP
	IngressProtocol  // the inner frame is neither IPv4 nor IPv6
	IngressMalformed // the inner packet contradicts its own lengths
	IngressSource    // the inner source is not in the sender's subnet
	IngressNotOurs   // the inner destination is not in this node's subnet
	IngressECN       // congestion marked outside, not understood inside (RFC 6040)
	IngressDown      // the tunnel device is down
	IngressNoBuffers // the kernel is short of memory
	IngressWrite     // the device refused it

	reasons // how many there are
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

// Reasons lists every reason for a drop, in the order of a packet's way.
func Reasons() []Reason {
	all := make([]Reason, 0, reasons-1)
	for r := Accepted + 1; r < reasons; r++ {
		all = append(all, r)
	}
	return all
}

// Counters are what one direction of the loop has done. The loop adds to them
// once per batch; anyone may read them at any time.
type Counters struct {
	Packets  atomic.Uint64 // inner packets carried, counted as on the wire (segments)
	Bytes    atomic.Uint64 // of inner packets, headers included
	Frames   atomic.Uint64 // device reads or writes: one frame may hold many packets
	Super    atomic.Uint64 // of Frames: those that left whole, as super-frames
	Syscalls atomic.Uint64 // reads, writes, sends and receives, waits apart
	Waits    atomic.Uint64 // times the loop had nothing to do and slept
	Drops    [reasons]atomic.Uint64
}

// tally is a Counters' increment, kept by the loop's own goroutine and
// published once per batch.
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

// publish adds the tally to c and begins a new one.
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
