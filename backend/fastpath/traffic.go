package fastpath

import (
	"errors"

	"github.com/cilium/ebpf"

	"culvert/internal/firewall"
	"culvert/internal/host"
)

// Exchanged returns what was sent to each peer, by the programs or the device behind
// them, and what the programs have taken from each, since they were loaded; nil while the
// fast path is off.
func (p *Path) Exchanged() map[firewall.Source]firewall.Exchanged {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exchanged()
}

// Counts reports whether the programs count what is sent to peers: they are attached, or
// about to be.
func (p *Path) Counts() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.loaded != nil && !p.refused
}

// Activity returns for each peer whether packets were sent and received by the fast path
// since the last call.
func (p *Path) Activity() []host.PeerActivity {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.exchanged()
	all := make([]host.PeerActivity, 0, len(now))
	for s, e := range now {
		before := p.seen[s]
		all = append(all, host.PeerActivity{Source: s, Sent: e.Sent.Packets > before.Sent.Packets, Received: e.Received.Packets > before.Received.Packets})
	}
	p.seen = now
	return all
}

func (p *Path) exchanged() map[firewall.Source]firewall.Exchanged {
	if p.loaded == nil || !p.on {
		return nil
	}
	sent, err := sums[peerKey](p.loaded.Maps["sent"], len(p.held.pairs))
	taken, failed := sums[sourceKey](p.loaded.Maps["sources"], len(p.held.pairs))
	if err := errors.Join(err, failed); err != nil {
		p.log.Debug("cannot read the fast path's counters", "error", err)
		return nil
	}
	all := make(map[firewall.Source]firewall.Exchanged, len(p.held.pairs))
	for _, x := range p.held.pairs {
		all[x.Source] = firewall.Exchanged{Sent: firewall.Count(sent[x.peer]), Received: firewall.Count(taken[x.source])}
	}
	return all
}

// sums reads a map of about n counters, each summed over all CPUs.
func sums[K comparable](m *ebpf.Map, n int) (map[K]traffic, error) {
	const most = 1024 // entries in a call
	var (
		cpus   = ebpf.MustPossibleCPU()
		keys   = make([]K, most)
		values = make([]traffic, most*cpus)
		all    = make(map[K]traffic, n)
		cursor ebpf.MapBatchCursor
	)
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil, err
		}
		for i, key := range keys[:n] {
			var sum traffic
			for _, t := range values[i*cpus : (i+1)*cpus] {
				sum.Packets += t.Packets
				sum.Bytes += t.Bytes
			}
			all[key] = sum
		}
		if err != nil { // that was all
			return all, nil
		}
	}
}
