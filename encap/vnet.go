package encap

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// vnetHeaderLen is the length of the virtio header before every frame of a TUN
// device with IFF_VNET_HDR.
const vnetHeaderLen = 10

// vnetHeader is struct virtio_net_hdr (linux/virtio_net.h), in host byte order.
// It describes a frame's pending offloads: checksum completion and segmentation.
type vnetHeader struct {
	flags      uint8
	gsoType    uint8
	hdrLen     uint16 // bytes of headers, which every segment repeats
	gsoSize    uint16 // payload bytes per segment
	csumStart  uint16 // offset where the checksum's coverage begins
	csumOffset uint16 // offset of the checksum field from csumStart
}

const (
	vnetNeedsCsum = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM
	vnetDataValid = unix.VIRTIO_NET_HDR_F_DATA_VALID
	gsoNone       = unix.VIRTIO_NET_HDR_GSO_NONE
	gsoTCP4       = unix.VIRTIO_NET_HDR_GSO_TCPV4
	gsoTCP6       = unix.VIRTIO_NET_HDR_GSO_TCPV6
	gsoUDP        = unix.VIRTIO_NET_HDR_GSO_UDP_L4
	gsoECN        = unix.VIRTIO_NET_HDR_GSO_ECN // a bit on top of the type
)

func (h *vnetHeader) put(b []byte) {
	_ = b[vnetHeaderLen-1]
	b[0] = h.flags
	b[1] = h.gsoType
	binary.NativeEndian.PutUint16(b[2:], h.hdrLen)
	binary.NativeEndian.PutUint16(b[4:], h.gsoSize)
	binary.NativeEndian.PutUint16(b[6:], h.csumStart)
	binary.NativeEndian.PutUint16(b[8:], h.csumOffset)
}

func (h *vnetHeader) parse(b []byte) {
	_ = b[vnetHeaderLen-1]
	h.flags = b[0]
	h.gsoType = b[1]
	h.hdrLen = binary.NativeEndian.Uint16(b[2:])
	h.gsoSize = binary.NativeEndian.Uint16(b[4:])
	h.csumStart = binary.NativeEndian.Uint16(b[6:])
	h.csumOffset = binary.NativeEndian.Uint16(b[8:])
}
