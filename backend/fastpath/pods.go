package fastpath

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"culvert/internal/host"
)

// The maps' keys and values of bpf/pods.h.
type (
	ethernet struct {
		Destination, Source host.MAC
		Type                [2]byte
	}
	flowKey struct {
		Source, Destination address
		Ports               [4]byte // the source's and the destination's
		Protocol            uint32
	}
	position struct{ End, Acknowledged uint32 }
	shortcut struct {
		Until, Since     uint64
		Generation, Link uint32
		Given            position
		Away             int32
		Queued, Unqueued uint32
		Ethernet         ethernet
		Bridge           host.MAC
		Gave             uint8
		_                [7]uint8
	}
	candidate struct {
		Key          flowKey
		Family, Link uint32
		Pod, Bridge  host.MAC
	}
)

func (k flowKey) reversed() flowKey {
	return flowKey{k.Destination, k.Source, [4]byte{k.Ports[2], k.Ports[3], k.Ports[0], k.Ports[1]}, k.Protocol}
}

// nextGeneration makes every connection take the host's way until one of its packets has
// passed it again.
func (p *Path) nextGeneration() error {
	p.generation++
	return p.loaded.Maps["generations"].Put(uint32(0), p.generation)
}

// admissions is how many connections a second may be admitted at most. Each costs a few
// system calls; the programs propose the others again.
const admissions = 500

// admit reads the connections that the programs propose, until the reader is closed, and
// enters in the map those that may take the short way.
func (p *Path) admit(reader *ringbuf.Reader, shortcuts *ebpf.Map) {
	var second time.Time
	admitted := 0
	for {
		record, err := reader.Read()
		if err != nil {
			return
		}
		if now := time.Now(); now.Sub(second) > time.Second {
			second, admitted = now, 0
		}
		var c candidate
		if err := binary.Read(bytes.NewReader(record.RawSample), binary.NativeEndian, &c); err != nil || admitted == admissions {
			continue
		}
		entries := p.shortcutsFor(c)
		if entries == nil {
			continue
		}
		admitted++
		flow := c.tuple()
		err = admissible(flow)
		for key, s := range entries {
			if err == nil {
				err = shortcuts.Put(&key, &s)
			}
		}
		if err != nil {
			p.log.Debug("a flow keeps to the host's way", "source", flow.source, "destination", flow.destination, "why", err)
		}
	}
}

// shortcutsFor returns what is to be entered for a flow between a pod of this node and one of a
// peer's: both directions of a TCP connection, or one of UDP. Nil if it is no such flow.
func (p *Path) shortcutsFor(c candidate) map[flowKey]shortcut {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.IndexFunc(p.held.pods, func(l podLink) bool { return l.index == int(c.Link) && l.bridge == c.Bridge })
	t, there := p.held.tunnels[c.Family]
	if i < 0 || !there || !p.on {
		return nil
	}
	flow := c.tuple()
	out, in := c.Key, c.Key.reversed()
	pod, other := flow.source.Addr(), flow.destination.Addr()
	inward := c.Key.Protocol == unix.IPPROTO_UDP && !t.holds(pod)
	if inward {
		out, in, pod, other = in, out, other, pod
	}
	var peer peerKey
	longest := -1
	for _, s := range p.held.pairs {
		if s.Inner.Contains(other) && s.Inner.Bits() > longest {
			longest, peer = s.Inner.Bits(), s.peer
		}
	}
	if _, carried := p.held.peers[peer]; !carried || !t.holds(pod) {
		return nil
	}
	kind := etherType(c.Family)
	entries := map[flowKey]shortcut{
		out: {Link: c.Link, Ethernet: ethernet{host.MAC(peer.To[:6]), t.MAC, kind}, Bridge: c.Bridge},
		in:  {Link: c.Link, Ethernet: ethernet{c.Pod, c.Bridge, kind}},
	}
	if c.Key.Protocol == unix.IPPROTO_UDP { // the other direction proposes itself
		delete(entries, c.Key.reversed())
	}
	return entries
}

// etherType returns the EtherType of a family's packets.
func etherType(family uint32) [2]byte {
	if family == 6 {
		return [2]byte{0x86, 0xdd}
	}
	return [2]byte{8, 0}
}

// holds reports whether an address is in this node's subnet.
func (t tunnel) holds(a netip.Addr) bool {
	b := addressOf(a)
	for i := range b {
		if b[i]&t.Mask[i] != t.Subnet[i] {
			return false
		}
	}
	return true
}

func (c candidate) tuple() tuple {
	at := func(a address, port []byte) netip.AddrPort {
		n := 16
		if c.Family == 4 {
			n = 4
		}
		ip, _ := netip.AddrFromSlice(a[:n])
		return netip.AddrPortFrom(ip, binary.BigEndian.Uint16(port))
	}
	return tuple{uint8(c.Key.Protocol), at(c.Key.Source, c.Key.Ports[:2]), at(c.Key.Destination, c.Key.Ports[2:])}
}
