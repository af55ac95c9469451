package backend

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"culvert/internal/api"
	"culvert/internal/host"
)

// Silence finds the silent peers: those that this node sends to and receives
// nothing from. Typical causes are a firewall on the path or on the peer, or
// another program on the peer that owns the tunnel's port. No counter shows them.
//
// A peer without traffic is not silent. Since traffic may be one-way, a peer that
// was sent to and has not answered within askAfter is sent echo requests
// (EchoSender.Send). After silentAfter without a packet from it, it is silent until one
// arrives.
type Silence struct {
	mu    sync.Mutex
	peers map[peerKey]*unanswered
	heard map[peerKey]time.Time // the last Observe that saw a packet of a peer
	probe map[peerKey]time.Time // the last echo request of the Prober
}

// peerKey identifies a peer: its subnet and its underlay address.
type peerKey struct {
	subnet netip.Prefix
	public netip.Addr
}

// unanswered is what is known of a peer that has not answered yet.
type unanswered struct {
	since time.Time // when the first packet was sent that no packet answered
	last  time.Time // when the last packet was sent
}

const (
	// silentAfter is how long a peer is sent to, without an answer, until it is silent.
	silentAfter = 30 * time.Second
	// askAfter is how long after the first unanswered packet echo requests begin.
	askAfter = 8 * time.Second
	// SilenceInterval is how often a datapath calls Observe.
	SilenceInterval = api.HeardWithin
	// forgetAfter is how long after the last packet sent a peer is forgotten.
	forgetAfter = 2 * time.Minute
)

// Observe records the traffic with all peers; a peer that is missing is
// forgotten. It returns the subnets of the peers to send an echo request.
func (s *Silence) Observe(now time.Time, all []host.PeerActivity) (ask []netip.Prefix) {
	s.mu.Lock()
	defer s.mu.Unlock()
	peers := make(map[peerKey]*unanswered)
	for _, e := range all {
		w := peerKey{e.Inner, e.Outer}
		h := s.peers[w]
		switch {
		case e.Received:
			if s.heard == nil {
				s.heard = make(map[peerKey]time.Time)
			}
			s.heard[w] = now
			continue
		case h == nil && (!e.Sent || now.Sub(s.probe[w]) < 2*SilenceInterval):
			continue // only pods' packets begin a silence, and this may be our own request
		case h == nil:
			h = &unanswered{since: now}
		}
		if e.Sent {
			h.last = now
		}
		if now.Sub(h.last) > forgetAfter {
			continue
		}
		peers[w] = h
		if now.Sub(h.since) >= askAfter {
			ask = append(ask, e.Inner)
		}
	}
	s.peers = peers
	return ask
}

// asked records that the Prober has sent a request.
func (s *Silence) asked(w peerKey, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.probe == nil {
		s.probe = make(map[peerKey]time.Time)
	}
	s.probe[w] = now
}

// asking returns the underlay addresses of the peers that the Prober has probed since
// about the last Observe.
func (s *Silence) asking(now time.Time) map[netip.Addr]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make(map[netip.Addr]bool)
	for w, at := range s.probe {
		if now.Sub(at) < SilenceInterval+time.Second {
			all[w.public] = true
		}
	}
	return all
}

// forget removes the state of addresses that are no longer peers.
func (s *Silence) forget(isPeer func(peerKey) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range []map[peerKey]time.Time{s.heard, s.probe} {
		maps.DeleteFunc(m, func(w peerKey, _ time.Time) bool { return !isPeer(w) })
	}
}

// Heard returns when a packet last came from a peer, accurate to SilenceInterval; zero if
// none was seen.
func (s *Silence) Heard(subnet netip.Prefix, public netip.Addr) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.heard[peerKey{subnet, public}]
}

// observe records the traffic that the kernel reports, sends the echo requests,
// and reports whether any peer has yet to answer.
func (s *Silence) observe(all []host.PeerActivity, sender *EchoSender) (waiting bool) {
	for _, subnet := range s.Observe(time.Now(), all) {
		sender.Send(subnet)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.peers) > 0
}

// Peers returns the silent peers, sorted by subnet.
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

// maxSilentWarnings is the number of silent peers that get a warning each; one more
// warning counts the rest.
const maxSilentWarnings = 10

// DescribeSilence adds the silent peers and warnings about them to a datapath's
// status. Packets names the tunnel's packets, such as "UDP port 8472".
func DescribeSilence(d *api.Datapath, s *Silence, packets string) {
	d.SilentPeers = s.Peers()
	for i, p := range d.SilentPeers {
		w := api.Warning{
			Check: "silent-peer",
			Text:  fmt.Sprintf("no packet has arrived from the peer at %s (%s) since %s, although this node sends to it", p.PublicIP, p.Subnet, p.Since.UTC().Format(time.RFC3339)),
			Fix:   fmt.Sprintf("check that the peer is running, and that firewalls on both nodes and between them allow %s in both directions", packets),
		}
		if i == maxSilentWarnings {
			w.Text = fmt.Sprintf("no packet has arrived from %d more peers that this node sends to", len(d.SilentPeers)-i)
			d.Warnings = append(d.Warnings, w)
			break
		}
		d.Warnings = append(d.Warnings, w)
	}
}
