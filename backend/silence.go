package backend

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"culvert/internal/api"
	"culvert/internal/host"
)

// Silence finds the peers to which this node sends and from which nothing comes:
// a firewall on the way or at the other end, or another program that takes the
// tunnel's packets there, loses one direction and counts it nowhere.
//
// A peer without traffic is not silent. One to which something was sent is asked
// for an answer (Ask), since traffic may go one way only; after silentAfter
// without any packet from it it is named, until one comes.
type Silence struct {
	mu    sync.Mutex
	peers map[way]*hearing
}

// way is a peer's subnet, and where it is reached.
type way struct {
	subnet netip.Prefix
	public netip.Addr
}

type hearing struct {
	since time.Time // the first packet sent after the last that came; zero if none was
	last  time.Time // the last packet that was sent
}

const (
	// silentAfter is for how long at least packets go before their peer is silent.
	silentAfter = 30 * time.Second
	// askAfter is when a peer is asked.
	askAfter = 8 * time.Second
	// SilenceInterval is how often a datapath looks.
	SilenceInterval = 5 * time.Second
	// forgetAfter is when a peer that nothing more is sent to is given up.
	forgetAfter = 2 * time.Minute
)

// Exchange is what has passed between this node and a peer since the last look.
type Exchange struct {
	Subnet         netip.Prefix
	Public         netip.Addr
	Sent, Received bool
}

// Observe takes what has passed with every peer. A peer that is not in it is
// forgotten. It returns the peers that are to be asked for an answer.
func (s *Silence) Observe(now time.Time, all []Exchange) (ask []netip.Prefix) {
	s.mu.Lock()
	defer s.mu.Unlock()
	peers := make(map[way]*hearing)
	for _, e := range all {
		w := way{e.Subnet, e.Public}
		h := s.peers[w]
		switch {
		case e.Received:
			continue
		case h == nil && !e.Sent:
			continue
		case h == nil:
			h = &hearing{since: now}
		}
		if e.Sent {
			h.last = now
		}
		if now.Sub(h.last) > forgetAfter {
			continue
		}
		peers[w] = h
		if now.Sub(h.since) >= askAfter {
			ask = append(ask, e.Subnet)
		}
	}
	s.peers = peers
	return ask
}

// observe takes what the kernel says has passed, asks whom it concerns, and says
// whether anybody is waited for.
func (s *Silence) observe(passed []host.Passed, asker *Asker) (waiting bool) {
	all := make([]Exchange, len(passed))
	for i, p := range passed {
		all[i] = Exchange{Subnet: p.Inner, Public: p.Outer, Sent: p.Sent, Received: p.Received}
	}
	for _, subnet := range s.Observe(time.Now(), all) {
		asker.Ask(subnet)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.peers) > 0
}

// Peers returns the silent ones, by subnet.
func (s *Silence) Peers() []api.SilentPeer {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []api.SilentPeer
	for w, h := range s.peers {
		if h.last.Sub(h.since) >= silentAfter {
			all = append(all, api.SilentPeer{Subnet: w.subnet, PublicIP: w.public, Since: h.since})
		}
	}
	slices.SortFunc(all, func(a, b api.SilentPeer) int {
		return cmp.Or(a.Subnet.Compare(b.Subnet), a.PublicIP.Compare(b.PublicIP))
	})
	return all
}

// silentNamed is how many silent peers have a warning of their own.
const silentNamed = 10

// DescribeSilence adds the silent peers to a datapath's status; packets says which
// the tunnel's are.
func DescribeSilence(d *api.Datapath, s *Silence, packets string) {
	d.SilentPeers = s.Peers()
	for i, p := range d.SilentPeers {
		w := api.Warning{
			Check: "silent-peer",
			Text:  fmt.Sprintf("nothing has come from the peer at %s (%s) since %s, although this node sends to it", p.PublicIP, p.Subnet, p.Since.UTC().Format(time.RFC3339)),
			Fix:   fmt.Sprintf("see that it runs, and that the firewalls there, here and on the way let %s through in both directions", packets),
		}
		if i == silentNamed {
			w.Text = fmt.Sprintf("nothing has come from %d more peers to which this node sends", len(d.SilentPeers)-i)
			d.Warnings = append(d.Warnings, w)
			break
		}
		d.Warnings = append(d.Warnings, w)
	}
}
