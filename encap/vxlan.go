package encap

import "encoding/binary"

// VXLANHeaderLen is the bytes between the outer UDP header and the inner IP
// packet: the VXLAN header and the inner Ethernet header.
const VXLANHeaderLen = 8 + ethernetHeaderLen

// VXLANCost is VXLAN's overhead in bytes: the outer IP header (20 or 40), the
// outer UDP header (8), and VXLANHeaderLen.
func VXLANCost(underlay4 bool) int {
	if underlay4 {
		return 20 + 8 + VXLANHeaderLen
	}
	return 40 + 8 + VXLANHeaderLen
}

const (
	ethernetHeaderLen = 14
	etherTypeIPv4     = 0x0800
	etherTypeIPv6     = 0x86dd

	vxlanFlagI = 0x08 // the VNI is valid
)

// VXLAN is the header of RFC 7348, section 5, together with the inner Ethernet
// header that follows it:
//
//	 0                   1                   2                   3
//	 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//	+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//	|R|R|R|R|I|R|R|R|            reserved                           |
//	+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//	|                VXLAN network identifier       |   reserved    |
//	+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//	|      destination MAC (6)    |    source MAC (6)  | type (2)   |
//	+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//
// Reserved bits are sent as zero and ignored on receipt, so frames with the group
// policy extension are accepted.
type VXLAN struct {
	VNI                 uint32 // 24 bits
	Destination, Source [6]byte
	EtherType           uint16
}

// Put writes the header into the first VXLANHeaderLen bytes of b.
func (h *VXLAN) Put(b []byte) {
	_ = b[VXLANHeaderLen-1]
	binary.BigEndian.PutUint32(b, vxlanFlagI<<24)
	binary.BigEndian.PutUint32(b[4:], h.VNI<<8)
	copy(b[8:], h.Destination[:])
	copy(b[14:], h.Source[:])
	binary.BigEndian.PutUint16(b[20:], h.EtherType)
}

// Parse overwrites h with the header at the start of the datagram and returns
// Accepted, IngressShort or IngressFlags.
func (h *VXLAN) Parse(datagram []byte) Reason {
	*h = VXLAN{}
	if len(datagram) < VXLANHeaderLen {
		return IngressShort
	}
	if datagram[0]&vxlanFlagI == 0 {
		return IngressFlags
	}
	h.VNI = binary.BigEndian.Uint32(datagram[4:]) >> 8
	h.Destination = [6]byte(datagram[8:])
	h.Source = [6]byte(datagram[14:])
	h.EtherType = binary.BigEndian.Uint16(datagram[20:])
	return Accepted
}
