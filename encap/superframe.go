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
const superHeadroom = superVnetLen + ethernetHeaderLen + ipv6HeaderLen + udpHeaderLen + maxHeaderLen

// NextHop is the neighbour on the uplink by which super-frames reach a peer.
type NextHop struct {
	MAC, Uplink [6]byte    // Ethernet addresses of the neighbour and the uplink
	Source      netip.Addr // the outer source
	MTU         int        // of the uplink, bytes
}

// superPath is the precomputed headers for a NextHop.
type superPath struct {
	head    []byte // virtio, Ethernet, IP, UDP and tunnel headers, without lengths and checksums
	ipLen   int
	udp     bool
	pseudo  uint64 // of the outer UDP checksum, without the length
	largest int    // bytes of the longest inner segment
}

// newSuperPath returns the superPath to a peer by a next hop of the same family. If the
// outer header is not UDP, the program that redirects the frames tells the kernel about it.
func newSuperPath(p *Peer, n *NextHop) *superPath {
	is4 := n.Source.Is4()
	s := &superPath{ipLen: ipv6HeaderLen, udp: overUDP(p.format), largest: n.MTU - Overhead(p.format, is4)}
	if is4 {
		s.ipLen = ipv4HeaderLen
	}
	s.head = make([]byte, superVnetLen+ethernetHeaderLen+s.ipLen, superHeadroom)
	s.head[0] = vnetNeedsCsum
	eth := s.head[superVnetLen:]
	copy(eth, n.MAC[:])
	copy(eth[6:], n.Uplink[:])
	binary.BigEndian.PutUint16(eth[12:], etherTypeOf(is4))
	ip, proto := eth[ethernetHeaderLen:], p.format.Protocol()
	if is4 {
		ip[0], ip[8], ip[9] = 4<<4|5, ttl, proto
		from, to := n.Source.As4(), p.Underlay.Addr().As4()
		copy(ip[12:], from[:])
		copy(ip[16:], to[:])
		s.pseudo = add16(sum(ip[12:20], 0), uint16(proto))
	} else {
		ip[0], ip[6], ip[7] = 6<<4, proto, ttl
		from, to := n.Source.As16(), p.Underlay.Addr().As16()
		copy(ip[8:], from[:])
		copy(ip[24:], to[:])
		s.pseudo = add16(sum(ip[8:40], 0), uint16(proto))
	}
	if s.udp {
		s.head[0] |= vnetTunnelCsum
		s.head[1] = gsoUDPTunnelIP6
		if is4 {
			s.head[1] = gsoUDPTunnelIP4
		}
		outer := ethernetHeaderLen + s.ipLen
		inner := outer + udpHeaderLen + len(p.header) // offset of the inner IP header
		binary.LittleEndian.PutUint16(s.head[20:], uint16(outer))
		binary.LittleEndian.PutUint16(s.head[22:], uint16(inner))
		var udp [udpHeaderLen]byte
		binary.BigEndian.PutUint16(udp[2:], p.Underlay.Port())
		s.head = append(s.head, udp[:]...)
	}
	s.head = append(s.head, p.header...)
	return s
}

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
	if s.ipLen == ipv4HeaderLen {
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
		binary.BigEndian.PutUint16(ip[4:], uint16(outer-ipv6HeaderLen))
	}
	if !s.udp {
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
	if path == nil || e.super == nil || !e.offload.SuperFrame.Load() {
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
	if segments < 2 || source.socket == nil || e.fragments(peer) {
		return false
	}
	room := e.slab[at-len(path.head) : at+p.length] // there is room: slabStart
	fields := outerFields{class: p.class & e.classes, id: e.superID, port: source.port, df: e.dontFragment}
	if !path.stamp(room, p, kind, size, fields) {
		return false
	}
	e.frame[0] = iovecOf(room)
	for {
		errno := e.super.write(e.frame[:])
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
			peer.suspend(mechanismSuper)
		default:
			// The device is down or gone: use the sockets until the uplink's watcher
			// enables super-frames again.
			e.offload.SuperFrame.Store(false)
		}
		return false
	}
}
