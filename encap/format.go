package encap

import "golang.org/x/sys/unix"

// Format is a wire format: which sockets carry its packets, and the header that it puts
// before every inner packet. A Format is stateless. Its methods never allocate and keep
// no slice that they are given.
//
// Everything else is common to all formats: how datagrams are received from UDP sockets
// (udp.go) and from packet sockets (rawip.go), the checks of the inner packet, offloads
// and path MTU discovery.
//
// To add a format: implement Format in a file of its own and list it in formats.
type Format interface {
	// Name is the format's name in leases and in the network configuration.
	Name() string
	// Protocol is the IP protocol of its packets. UDP packets are sent and received by
	// UDP sockets; those of any other protocol are sent by a raw socket, with DF and
	// over IPv4 only, and received by packet sockets.
	Protocol() uint8
	// HeaderLen is the bytes of its header, between the outer UDP or IP header and the
	// inner packet: at most maxHeaderLen. After a UDP header it must be at least
	// vnetHeaderLen, since the virtio header for the device is written over it.
	HeaderLen() int
	// Put writes the first HeaderLen bytes of b: the header of packets with inner
	// packets of this EtherType, from one node to another.
	Put(b []byte, from, to VTEP, etherType uint16)
	// Check checks the header at the start of a received packet d, outer headers
	// removed, which is for self. It returns the EtherType of the inner packet, and
	// Accepted or the reason to drop the packet; IngressShort if d has no whole header.
	Check(d []byte, self *VTEP) (etherType uint16, r Reason)
	// SuperFrames reports whether the kernel can segment its packets, so that large
	// frames may be sent whole (superframe.go).
	SuperFrames() bool
}

// The wire formats.
var (
	VXLAN Format = vxlan{}
	IPIP  Format = ipip{}

	formats = []Format{VXLAN, IPIP}
)

// VTEP identifies a node in the headers of formats that have a network identifier and
// an inner Ethernet header. It is zero for others.
type VTEP struct {
	VNI uint32 // 24 bits
	MAC [6]byte
}

// FormatNamed returns the format with the name, and false if there is none.
func FormatNamed(name string) (Format, bool) {
	for _, f := range formats {
		if f.Name() == name {
			return f, true
		}
	}
	return nil, false
}

// FormatNames returns the names of all formats.
func FormatNames() []string {
	var names []string
	for _, f := range formats {
		names = append(names, f.Name())
	}
	return names
}

// Overhead returns what a format takes from the underlay's MTU, in bytes: its header and
// the outer headers before it.
func Overhead(f Format, underlay4 bool) int {
	n := ipv6HeaderLen
	if underlay4 {
		n = ipv4HeaderLen
	}
	if overUDP(f) {
		n += udpHeaderLen
	}
	return n + f.HeaderLen()
}

// overUDP reports whether a format's packets are UDP datagrams.
func overUDP(f Format) bool { return f.Protocol() == unix.IPPROTO_UDP }

const (
	// maxHeaderLen bounds Format.HeaderLen: buffers have this headroom.
	maxHeaderLen = VXLANHeaderLen

	ipv4HeaderLen = 20 // without options
	ipv6HeaderLen = 40

	etherTypeIPv4 = 0x0800
	etherTypeIPv6 = 0x86dd
)

// etherTypeOf returns the EtherType of a family's packets.
func etherTypeOf(is4 bool) uint16 {
	if is4 {
		return etherTypeIPv4
	}
	return etherTypeIPv6
}
