package encap

import (
	"encoding/binary"
	"net/netip"
)

// A super-frame is a TCP or UDP GSO packet of up to 64 KB with the tunnel's
// headers before it, written to a TAP device whole. The kernel, or the uplink's
// hardware, segments it and repeats the tunnel's headers for each segment (Linux
// 6.17: TUN_F_UDP_TUNNEL_GSO, virtio_net_hdr_tnl_to_skb in linux/virtio_net.h).
// The TAP's frames are redirected to the uplink unchanged, so the loop writes the
// outer Ethernet header as well.

const (
	// superVnetLen is the length of struct virtio_net_hdr_v1_hash_tunnel.
	superVnetLen = 24
	udpLen       = 8

	vnetTunnelCsum  = 8    // VIRTIO_NET_HDR_F_UDP_TUNNEL_CSUM
	gsoUDPTunnelIP4 = 0x20 // VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV4
	gsoUDPTunnelIP6 = 0x40 // VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV6

	ttl = 64

	// Every superKeep-th super-frame is sent through the sockets instead, so that
	// the kernel sees the neighbour entry in use and revalidates it when it is
	// stale.
	superKeep = 256
)

// superHeadroom is the maximum bytes of headers before a super-frame's inner
// packet.
const superHeadroom = superVnetLen + ethernetHeaderLen + 40 + udpLen + VXLANHeaderLen

// NextHop is the neighbour on the uplink by which super-frames reach a peer.
type NextHop struct {
	MAC, Uplink [6]byte    // Ethernet addresses of the neighbour and the uplink
	Source      netip.Addr // the outer source
	MTU         int        // of the uplink, bytes
}

// superPath is the precomputed headers for a NextHop.
type superPath struct {
	head    []byte // virtio, Ethernet, IP, UDP and VXLAN headers, without lengths and checksums
	ipLen   int
	ipip    bool
	pseudo  uint64 // of the outer UDP checksum, without the length
	largest int    // bytes of the longest inner segment
}

// SetNextHop sets the next hop of super-frames to the peer. With nil, frames are
// cut in userspace. It is safe for concurrent use.
func (p *Peer) SetNextHop(n *NextHop) {
	if n == nil || n.Source.Is4() != p.Underlay.Addr().Is4() {
		p.super.Store(nil)
		return
	}
	if len(p.header) == 0 {
		p.super.Store(ipipPath(p, n))
		return
	}
	s := &superPath{ipLen: 20}
	tunnel := uint8(gsoUDPTunnelIP4)
	if !n.Source.Is4() {
		s.ipLen = 40
		tunnel = gsoUDPTunnelIP6
	}
	s.largest = n.MTU - s.ipLen - udpLen - len(p.header)
	s.head = make([]byte, superVnetLen+ethernetHeaderLen+s.ipLen+udpLen, superHeadroom)
	s.head[0] = vnetNeedsCsum | vnetTunnelCsum
	s.head[1] = tunnel
	binary.LittleEndian.PutUint16(s.head[20:], uint16(ethernetHeaderLen+s.ipLen))
	binary.LittleEndian.PutUint16(s.head[22:], uint16(ethernetHeaderLen+s.ipLen+udpLen+len(p.header)))

	eth := s.head[superVnetLen:]
	copy(eth, n.MAC[:])
	copy(eth[6:], n.Uplink[:])
	ip := eth[ethernetHeaderLen:]
	if n.Source.Is4() {
		binary.BigEndian.PutUint16(eth[12:], etherTypeIPv4)
		ip[0], ip[8], ip[9] = 4<<4|5, ttl, protoUDP
		from, to := n.Source.As4(), p.Underlay.Addr().As4()
		copy(ip[12:], from[:])
		copy(ip[16:], to[:])
		s.pseudo = add16(sum(ip[12:20], 0), protoUDP)
	} else {
		binary.BigEndian.PutUint16(eth[12:], etherTypeIPv6)
		ip[0], ip[6], ip[7] = 6<<4, protoUDP, ttl
		from, to := n.Source.As16(), p.Underlay.Addr().As16()
		copy(ip[8:], from[:])
		copy(ip[24:], to[:])
		s.pseudo = add16(sum(ip[8:40], 0), protoUDP)
	}
	udp := ip[s.ipLen:]
	binary.BigEndian.PutUint16(udp[2:], p.Underlay.Port())
	s.head = append(s.head, p.header...)
	p.super.Store(s)
}

// ipipPath returns the IPIP superPath. The program that redirects the frames tells
// the kernel about the outer header.
func ipipPath(p *Peer, n *NextHop) *superPath {
	s := &superPath{ipLen: 20, largest: n.MTU - IPIPCost, ipip: true}
	s.head = make([]byte, superVnetLen+ethernetHeaderLen+s.ipLen)
	s.head[0] = vnetNeedsCsum
	eth := s.head[superVnetLen:]
	copy(eth, n.MAC[:])
	copy(eth[6:], n.Uplink[:])
	binary.BigEndian.PutUint16(eth[12:], etherTypeIPv4)
	ipipHeader(eth[ethernetHeaderLen:], n.Source, p.Underlay.Addr())
	return s
}

// HasNextHop reports whether a next hop for super-frames to the peer is set.
func (p *Peer) HasNextHop() bool { return p.super.Load() != nil }

// outerFields are the outer header fields that differ between super-frames to one
// peer.
type outerFields struct {
	class uint8
	id    uint16 // IPv4 identification
	port  uint16 // UDP source
	df    bool   // IPv4: do not fragment
}

// stamp writes the headers before the inner packet p, which begins at
// room[len(s.head)]. It returns false, and writes nothing, if the outer packet or
// a segment would be too long.
func (s *superPath) stamp(room []byte, p *packet, kind uint8, size int, o outerFields) bool {
	outer := len(s.head) - superVnetLen - ethernetHeaderLen + p.length // length of the outer IP packet
	if outer > maxFrameLen || p.headLen+size > s.largest {
		return false
	}
	head := room[:len(s.head)]
	copy(head, s.head)
	inner := len(s.head) - superVnetLen
	head[1] |= kind
	binary.LittleEndian.PutUint16(head[2:], uint16(inner+p.headLen))
	binary.LittleEndian.PutUint16(head[4:], uint16(size))
	binary.LittleEndian.PutUint16(head[6:], uint16(inner+p.ipLen))
	binary.LittleEndian.PutUint16(head[8:], uint16(p.checkOffset()-p.ipLen))

	ip := head[superVnetLen+ethernetHeaderLen:]
	if s.ipLen == 20 {
		ip[1] = o.class
		binary.BigEndian.PutUint16(ip[2:], uint16(outer))
		binary.BigEndian.PutUint16(ip[4:], o.id)
		if o.df {
			ip[6] |= 0x40
		}
		putChecksum(ip[10:], ^fold(sum(ip[:20], 0)))
	} else {
		ip[0] = 6<<4 | o.class>>4
		ip[1] = o.class << 4
		binary.BigEndian.PutUint16(ip[4:], uint16(outer-40))
	}
	if s.ipip {
		return true
	}
	udp := ip[s.ipLen:]
	binary.BigEndian.PutUint16(udp, o.port)
	binary.BigEndian.PutUint16(udp[4:], uint16(outer-s.ipLen))
	putChecksum(udp[6:], fold(add16(s.pseudo, uint16(outer-s.ipLen))))
	return true
}

// superFrame sends the frame at slab[at:] whole and returns true, or returns
// false. The frame's packet is not modified: the headers overwrite only the slab
// before it, which the caller has flushed.
func (e *egress) superFrame(peer *Peer, at int, p *packet, kind uint8, size int) bool {
	path := peer.super.Load()
	if path == nil || !e.offload.SuperFrame.Load() {
		return false
	}
	if e.superSent++; e.superSent%superKeep == 0 {
		return false
	}
	if fits := peer.fits(); fits != 0 && p.headLen+size > fits {
		return false // segments that the uplink cuts are not fragmented
	}
	payload := p.length - p.headLen
	segments := (payload + size - 1) / size
	source := e.source(e.socket(peer, e.slab[at:], p))
	if segments < 2 || source.Socket.FD() < 0 || e.fragments(peer) {
		return false
	}
	room := e.slab[at-len(path.head) : at+p.length] // there is room: slabStart
	fields := outerFields{class: p.class & e.classes, id: e.superID, port: source.Port, df: e.dontFragment}
	if !path.stamp(room, p, kind, size, fields) {
		return false
	}
	for {
		_, errno := write(e.super, room)
		e.tally.syscalls++
		if errno == 0 {
			e.superID += uint16(segments)
			e.tally.packets += uint64(segments)
			e.tally.bytes += uint64(payload + segments*p.headLen)
			e.share.add(peer, segments, payload+segments*p.headLen)
			e.tally.super++
			return true
		}
		switch superWrite.of(errno).fault {
		case faultAgain:
			continue
		case faultPast:
		case faultRefused:
			peer.refuse(refusesSuper)
		default:
			// The device is down or gone: use the sockets until the uplink's watcher
			// enables super-frames again.
			e.offload.SuperFrame.Store(false)
		}
		return false
	}
}
