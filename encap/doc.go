// Package encap is culvert's userspace datapath: the wire formats, and the batched
// loop that carries packets between a TUN device and the underlay's sockets. It keeps the peer table, path MTUs and counters in
// memory. It opens and configures no device or socket (package backend/tunnel
// does) and knows nothing of leases (package subnet does).
//
// The path of a packet from a pod to a pod on another node:
//
//	pod ── veth ── cni0 ── route ── TUN            egress.go, on the sending node
//	 1. read one frame: up to 64 KB of one flow, with a virtio header   (vnet.go)
//	 2. look up the peer that leases the inner destination            (table.go)
//	 3. cut the frame into segments, each with its own headers       (segment.go)
//	 4. copy the peer's tunnel header before each               (peers.go, vxlan.go)
//	 5. send them all in one call, which the kernel cuts up again  (sendbatch.go)
//	    or, in place of 3 to 5, hand the frame to the uplink whole (superframe.go)
//
//	UDP socket ── TUN ── route ── cni0 ── veth ── pod     ingress.go, on the other
//	 6. receive a batch of datagrams                                (recvbatch.go)
//	 7. take each apart into segments and check them: tunnel header,
//	    inner source and destination                       (udp.go, ingress.go)
//	 8. join the segments of a flow again                           (coalesce.go)
//	 9. write each run to the TUN in one call, with a virtio header
//
// A wire format is a header of its own on UDP, as VXLAN (vxlan.go), or an IP protocol of
// its own, as IPIP (ipip.go), which other sockets carry (rawip.go); the seam is Format
// (format.go). The threads and how they wait are in queue.go, path MTU discovery in
// pathmtu.go.
//
// Payload is not copied in userspace, except to fragment a packet or to repeat a
// rejected frame: segments and runs are lists of slices into the buffer that the
// kernel filled. The path allocates nothing per packet, takes no lock and uses
// no channel, and no timer waits for a batch to fill: a batch is what the kernel
// had when it was read.
package encap
