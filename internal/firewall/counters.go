package firewall

import (
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/names"
)

// Drops returns the number of packets dropped by culvert's rules, by reason, 0
// included. The counters restart when the chains are replaced, as when a peer has a
// subnet of a new size.
func Drops(p Policy) map[string]uint64 {
	t := p.table()
	if t == nil {
		return nil
	}
	c, err := nftables.New()
	if err != nil {
		return nil
	}
	drops := make(map[string]uint64)
	for _, ch := range t.chains {
		reasons := make(map[string]string)
		for _, r := range ch.rules {
			if r.reason != "" {
				reasons[label(r.text)] = r.reason
				drops[r.reason] += 0
			}
		}
		if len(reasons) == 0 {
			continue
		}
		rules, err := c.GetRules(ourTable(), &nftables.Chain{Table: ourTable(), Name: ch.name})
		if err != nil {
			continue
		}
		for _, r := range rules {
			for _, e := range r.Exprs {
				if n, ok := e.(*expr.Counter); ok && reasons[commentText(r.UserData)] != "" {
					drops[reasons[commentText(r.UserData)]] += n.Packets
				}
			}
		}
	}
	return drops
}

// Count is the traffic with a peer in one direction: bytes of inner packets, and
// packets as a hook sees them, which may have been coalesced (GRO).
type Count struct{ Packets, Bytes uint64 }

// Exchanged is the traffic with a peer in both.
type Exchanged struct {
	Sent, Received Count
	Dropped        uint64 // packets with the peer's underlay address as source
}

// PeerCounters reads what the rules have accepted from each peer, on one socket.
type PeerCounters struct{ conn *netlink.Conn }

// OpenPeerCounters opens the socket in the network namespace of the calling thread.
func OpenPeerCounters() (PeerCounters, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		err = refused("opening nftables", err)
	}
	return PeerCounters{c}, err
}

// Close closes the socket.
func (c PeerCounters) Close() error { return c.conn.Close() }

// Received returns the traffic of each peer since its set was created. Peers of a
// set that was created without counters are missing. With 5,000 peers it takes some
// milliseconds.
func (c PeerCounters) Received(tunnels []TunnelRule) (map[Source]Count, error) {
	all := make(map[Source]Count)
	for _, t := range tunnels {
		if t.Device == "" {
			continue
		}
		for _, s := range t.sets() {
			elements, err := setElements(c.conn, nftables.TableFamilyINet, names.Table, s.name)
			if err != nil {
				return all, fmt.Errorf("reading the counters of the nftables set %s: %w", s.name, err)
			}
			for _, e := range elements {
				if source, ok := s.sourceOf(e); ok && e.Counter != nil {
					n := e.Counter
					all[source] = Count{n.Packets, n.Bytes - min(n.Bytes, n.Packets*t.outerLen())}
				}
			}
		}
	}
	return all, nil
}

// Counts returns what the rules of a policy have counted by peer since its sets were
// created. What was received without a tunnel, and what was sent, has no Outer; what
// was dropped has no Inner.
func Counts(p Policy) (map[Source]Exchanged, error) {
	c, err := OpenPeerCounters()
	if err != nil {
		return nil, err
	}
	all := make(map[Source]Exchanged)
	received, err := c.Received(p.Tunnels)
	for s, n := range received {
		all[s] = Exchanged{Received: n}
	}
	sets := p.Count.sets()
	for _, t := range p.Tunnels {
		if t.Device != "" && t.Local.IsValid() {
			sets = append(sets, t.nodes())
		}
	}
	for _, s := range sets {
		elements, failed := setElements(c.conn, nftables.TableFamilyINet, names.Table, s.name)
		err = errors.Join(err, failed)
		for _, element := range elements {
			of, ok := s.sourceOf(element)
			if !ok || element.Counter == nil {
				continue
			}
			e := all[of]
			switch n := (Count{element.Counter.Packets, element.Counter.Bytes}); s.kind {
			case outerAddresses:
				e.Dropped = n.Packets
			case destinations:
				e.Sent = n
			default:
				e.Received = n
			}
			all[of] = e
		}
	}
	return all, errors.Join(err, c.Close())
}

// outerLen is the length of the headers before the inner packet, as the input hook
// counts them.
func (t TunnelRule) outerLen() uint64 {
	n := uint64(20)
	if !t.is4() {
		n = 40
	}
	if t.Port != 0 {
		n += 8 + 8 + 14
	}
	return n
}
