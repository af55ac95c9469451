package encap

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// VXLANHeaderLen is the bytes between the outer UDP header and the inner IP
// packet: the VXLAN header and the inner Ethernet header.
const VXLANHeaderLen = 8 + ethernetHeaderLen

const (
	ethernetHeaderLen = 14

	vxlanFlagI = 0x08 // the VNI is valid
)

// vxlan is the wire format of RFC 7348, section 5, over UDP:
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
// policy extension are accepted. The inner source MAC is not checked: the inner source
// address is.
type vxlan struct{}

func (vxlan) Name() string      { return "vxlan" }
func (vxlan) Protocol() uint8   { return unix.IPPROTO_UDP }
func (vxlan) HeaderLen() int    { return VXLANHeaderLen }
func (vxlan) SuperFrames() bool { return true }

func (vxlan) Put(b []byte, from, to VTEP, etherType uint16) {
	_ = b[VXLANHeaderLen-1]
	binary.BigEndian.PutUint32(b, vxlanFlagI<<24)
	binary.BigEndian.PutUint32(b[4:], from.VNI<<8)
	copy(b[8:], to.MAC[:])
	copy(b[14:], from.MAC[:])
	binary.BigEndian.PutUint16(b[20:], etherType)
}

// Check returns IngressShort, IngressFlags, IngressVNI, IngressMAC or IngressProtocol
// for a packet to drop.
func (vxlan) Check(d []byte, self *VTEP) (etherType uint16, r Reason) {
	if len(d) < VXLANHeaderLen {
		return 0, IngressShort
	}
	if d[0]&vxlanFlagI == 0 {
		return 0, IngressFlags
	}
	if binary.BigEndian.Uint32(d[4:])>>8 != self.VNI {
		return 0, IngressVNI
	}
	if [6]byte(d[8:]) != self.MAC {
		return 0, IngressMAC
	}
	etherType = binary.BigEndian.Uint16(d[20:])
	if etherType != etherTypeIPv4 && etherType != etherTypeIPv6 {
		return 0, IngressProtocol
	}
	return etherType, Accepted
}
