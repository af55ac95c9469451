package firewall

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
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
type Exchanged struct{ Sent, Received Count }

// Counters is what the rules of a policy have counted by peer since its sets were created.
type Counters struct {
	Received map[Source]Count       // through a tunnel
	Direct   map[netip.Prefix]Count // received from a subnet without a tunnel
	Sent     map[netip.Prefix]Count // to a subnet
	Dropped  map[netip.Addr]uint64  // packets with the peer's underlay address as source
}

// PeerCounters reads the counters on one socket.
type PeerCounters struct{ conn *netlink.Conn }

// OpenPeerCounters opens the socket in the network namespace of the calling thread.
func OpenPeerCounters() (PeerCounters, error) {
	// The kernel fills at most 32 KB of a reader's buffer. For each part of a dump it walks a
	// set from the start (nft_rhash_walk), so that large parts matter.
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{MessageBufferSize: 32 << 10})
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
		if len(all) == 0 {
			all = make(map[Source]Count, len(t.Peers))
		}
		for _, s := range t.sets() {
			if err := c.read(s, func(of Source, n Count) {
				all[of] = Count{n.Packets, n.Bytes - min(n.Bytes, n.Packets*t.outerLen())}
			}); err != nil {
				return all, err
			}
		}
	}
	return all, nil
}

// read calls each for the elements of a set that have counters.
func (c PeerCounters) read(s set, each func(Source, Count)) error {
	err := eachCounter(c.conn, s.name, func(key []byte, n Count) {
		if of, ok := s.sourceOf(key); ok {
			each(of, n)
		}
	})
	if err != nil {
		return fmt.Errorf("reading the counters of the nftables set %s: %w", s.name, err)
	}
	return nil
}

// Counts reads all counters of a policy.
func Counts(p Policy) (Counters, error) {
	c, err := OpenPeerCounters()
	if err != nil {
		return Counters{}, err
	}
	all := Counters{
		Direct: make(map[netip.Prefix]Count, len(p.Count.Direct)), Sent: make(map[netip.Prefix]Count, len(p.Count.Sent)),
		Dropped: make(map[netip.Addr]uint64),
	}
	all.Received, err = c.Received(p.Tunnels)
	for _, s := range p.Count.sets() {
		to := all.Sent
		if s.kind == origins {
			to = all.Direct
		}
		err = errors.Join(err, c.read(s, func(of Source, n Count) { to[of.Inner] = n }))
	}
	for _, t := range p.Tunnels {
		if t.Device != "" && t.Local.IsValid() {
			err = errors.Join(err, c.read(t.nodes(), func(of Source, n Count) { all.Dropped[of.Outer] = n.Packets }))
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
