package backend

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"culvert/internal/api"
	"culvert/internal/echo"
)

// Prober measures the path to each peer with ICMP echo requests through the tunnel,
// to the first address of the peer's subnet. culvert and flannel nodes both have
// that address on their tunnel device and answer. A peer that is reached by a
// plain route is sent requests to its underlay address.
//
// A peer with traffic is probed rarely, to measure the round-trip time. The total
// rate of requests is bounded, whatever the number of peers.
type Prober struct {
	options ProberOptions
	changed chan struct{} // there are new targets

	mu    sync.Mutex
	peers map[peerKey]*probed
	queue probeQueue
	count api.Probes
}

// ProberOptions configure a Prober. All fields are required.
type ProberOptions struct {
	// Sources are this node's subnets. Requests have their first address as source.
	Sources  []netip.Prefix
	Silence  *Silence      // records when each peer was heard
	Interval time.Duration // ProbeInterval, or another to measure with
	Log      *slog.Logger
}

// ProbeTarget is a peer's subnet, and how to probe it.
type ProbeTarget struct {
	Subnet netip.Prefix
	Public netip.Addr
	Direct bool // reached by a plain route: probe the underlay address
	MTU    int  // size in bytes of the largest packet that pods send
}

// probed is the state of one target.
type probed struct {
	ProbeTarget
	next  time.Time // when it is due
	index int       // in the queue; -1 while it is being probed

	asked, answered time.Time
	unanswered      time.Time // the first of the failed requests
	busy            bool      // there was traffic when the last request was sent
	rtt             time.Duration
	mtu             int       // path MTU
	sized           time.Time // when mtu was measured
	failed, large   int       // consecutive lost requests: small ones, and full-size ones
	why             string    // the error of the last request
}

const (
	// ProbeInterval is the default minimum interval between requests to a peer. At
	// most probeBurst requests are sent per interval plus a random tenth of it;
	// every probeChurn while peers are added; and after a third of the interval if
	// a request was the first that a peer has not answered. Few large bursts cost
	// less than many small ones, which wake up every thread of the process each time.
	ProbeInterval = 30 * time.Second
	probeBurst    = 96
	probeChurn    = 5 * time.Second
	probeSoon     = 200 * time.Millisecond // delay after a change of the peers
	// probeActive is the minimum interval between requests to a peer with traffic.
	probeActive = 5 * time.Minute
	// activeFor is how long a peer is active after a packet from it.
	activeFor = time.Minute
	probeSize = 10 * time.Minute // interval between measurements of the path MTU
	// probeTimeout is the timeout of a request.
	probeTimeout = time.Second
)

// NewProber returns a Prober without targets.
func NewProber(o ProberOptions) *Prober {
	return &Prober{
		options: o, changed: make(chan struct{}, 1), peers: make(map[peerKey]*probed),
		count: api.Probes{Seconds: api.NewHistogram(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)},
	}
}

// Set replaces the targets. New targets are probed first.
func (p *Prober) Set(targets []ProbeTarget) {
	p.mu.Lock()
	defer p.mu.Unlock()
	peers := make(map[peerKey]*probed, len(targets))
	p.queue = p.queue[:0]
	fresh := false
	for _, t := range targets {
		w := peerKey{t.Subnet, t.Public}
		x := p.peers[w]
		if x == nil {
			x, fresh = &probed{}, true
		}
		if x.ProbeTarget != t {
			x.ProbeTarget, x.sized = t, time.Time{}
		}
		peers[w] = x
		if x.index >= 0 {
			x.index = len(p.queue)
			p.queue = append(p.queue, x)
		}
	}
	heap.Init(&p.queue)
	p.peers = peers
	p.options.Silence.forget(func(w peerKey) bool { return peers[w] != nil })
	if !fresh {
		return
	}
	select {
	case p.changed <- struct{}{}:
	default:
	}
}

// Retain removes the targets that are not among these. Called before the datapath
// forgets peers that left, it saves requests that the datapath would have to drop.
func (p *Prober) Retain(targets []ProbeTarget) {
	stay := make(map[peerKey]bool, len(targets))
	for _, t := range targets {
		stay[peerKey{t.Subnet, t.Public}] = true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	maps.DeleteFunc(p.peers, func(w peerKey, _ *probed) bool { return !stay[w] })
	p.queue = slices.DeleteFunc(p.queue, func(x *probed) bool { return !stay[peerKey{x.Subnet, x.Public}] })
	for i, x := range p.queue {
		x.index = i
	}
	heap.Init(&p.queue)
}

// has reports whether a target has not been removed.
func (p *Prober) has(x *probed) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.peers[peerKey{x.Subnet, x.Public}] == x
}

// Run probes until ctx ends. It sends the requests in bursts and waits for the
// answers: most of the cost is waking the datapath, and a burst wakes it once.
func (p *Prober) Run(ctx context.Context) {
	socket, err := p.open()
	if err != nil {
		p.options.Log.Warn("cannot probe peers", "error", err)
		return
	}
	defer socket.close()
	wait, last := probeSoon, time.Time{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		case <-p.changed:
			wait = max(probeSoon, time.Until(last.Add(probeChurn)))
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
		}
		began := time.Now()
		last = began
		wait = p.options.Interval + rand.N(p.options.Interval/10)
		if burst := p.take(began); len(burst) > 0 {
			if p.settle(burst, socket.measure(ctx, burst)) {
				wait = p.options.Interval / 3
			}
			p.search(ctx)
		}
		wait = max(0, wait-time.Since(began))
	}
}

// take removes the targets that are due from the queue, and returns the requests
// to send them.
func (p *Prober) take(now time.Time) (burst []request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.queue) > 0 && len(burst) < probeBurst {
		x := p.queue[0]
		if x.next.After(now) {
			break
		}
		if now.Sub(x.asked) < probeActive && !x.answered.IsZero() && x.failed == 0 && x.large == 0 && p.traffic(x) {
			x.next = now.Add(p.options.Interval)
			heap.Fix(&p.queue, 0)
			continue
		}
		heap.Pop(&p.queue)
		heard := p.options.Silence.Heard(x.Subnet, x.Public)
		x.busy = now.Sub(heard) < 2*SilenceInterval && (x.asked.IsZero() || p.traffic(x))
		x.asked = now
		p.options.Silence.asked(peerKey{x.Subnet, x.Public}, now)
		burst = append(burst, request{peer: x, to: x.address(), direct: x.Direct})
		if x.MTU > 0 && now.Sub(x.sized) > probeSize {
			burst = append(burst, request{peer: x, to: x.address(), direct: x.Direct, size: x.MTU})
		}
	}
	return burst
}

// address returns the address to probe.
func (t ProbeTarget) address() netip.Addr {
	if t.Direct {
		return t.Public
	}
	return t.Subnet.Masked().Addr()
}

// settle records the results of a burst and puts its targets back into the queue. After a
// first lost request the target is probed again in the next burst; soon reports that this
// burst must not wait for the interval.
func (p *Prober) settle(burst []request, errs []error) (soon bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, r := range burst {
		if errors.Is(errs[i], errLeft) {
			continue
		}
		x := r.peer
		p.count.Sent++
		if r.size > 0 {
			switch {
			case errs[i] == nil:
				x.mtu, x.sized, x.large = r.size, time.Now(), 0
			case x.failed == 0: // small ones pass
				x.large++
				p.count.Lost++
			default:
				p.count.Lost++
			}
			continue
		}
		x.next = x.asked.Add(p.options.Interval)
		if errs[i] != nil {
			p.count.Lost++
			if x.failed == 0 {
				x.unanswered = x.asked
			}
			if x.failed++; x.failed > 1 {
				x.why = errs[i].Error()
			} else {
				x.next, soon = x.asked, true
			}
		} else {
			p.count.Seconds.Observe(r.rtt.Seconds())
			x.answered, x.rtt, x.why, x.failed, x.unanswered = r.answered, r.rtt, "", 0, time.Time{}
		}
		if p.peers[peerKey{x.Subnet, x.Public}] == x {
			heap.Push(&p.queue, x)
		}
	}
	return soon
}

// search measures the path MTU of one target that lost two full-size requests in a
// row but answers small ones.
func (p *Prober) search(ctx context.Context) {
	p.mu.Lock()
	var x *probed
	for _, y := range p.queue {
		if y.large > 1 {
			x = y
			break
		}
	}
	if x == nil {
		p.mu.Unlock()
		return
	}
	to, want, rtt := x.address(), x.MTU, x.rtt
	x.large = 0
	p.mu.Unlock()
	pinger, err := echo.Open(p.source(to.Is4(), x.Direct))
	if err != nil {
		return
	}
	defer func() { _ = pinger.Close() }()
	low := 576
	if !to.Is4() {
		low = 1280
	}
	mtu, err := pinger.PathMTU(ctx, to, min(low, want), want, min(probeTimeout, max(200*time.Millisecond, 20*rtt)))
	p.mu.Lock()
	defer p.mu.Unlock()
	if err == nil {
		x.mtu, x.sized = mtu, time.Now()
	}
}

// source returns the source address of requests: that of this node's tunnel device,
// or unspecified for plain routes.
func (p *Prober) source(is4, direct bool) netip.Addr {
	for _, n := range p.options.Sources {
		if n.Addr().Is4() == is4 && !direct {
			return n.Masked().Addr()
		}
	}
	if is4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// traffic reports whether packets other than answers to requests were received from
// the peer since the last request. An answer may be noticed up to two looks later.
func (p *Prober) traffic(x *probed) bool {
	return p.options.Silence.Heard(x.Subnet, x.Public).Sub(x.asked) > 2*SilenceInterval
}

// Describe fills in a peer's state from the measurements and the traffic.
func (p *Prober) Describe(s *api.PeerState, now time.Time) {
	heard := p.options.Silence.Heard(s.Subnet, s.PublicIP)
	p.mu.Lock()
	defer p.mu.Unlock()
	x := p.peers[peerKey{s.Subnet, s.PublicIP}]
	if x == nil {
		x = &probed{}
	}
	s.Heard, s.Asked, s.Unanswered = heard, x.asked, x.unanswered
	if x.answered.After(heard) {
		s.Heard = x.answered
	}
	s.RTTSeconds, s.PathMTU = x.rtt.Seconds(), x.mtu
	traffic := !heard.IsZero() && (x.asked.IsZero() || p.traffic(x)) || x.busy && now.Sub(x.asked) < 3*SilenceInterval
	switch {
	case traffic && now.Sub(heard) < activeFor:
		s.State = api.PeerActive
	case x.why != "" && !s.Heard.After(x.asked):
		s.State, s.Problem = api.PeerSilent, x.why
		s.RTTSeconds = 0
	case !s.Heard.IsZero():
		s.State = api.PeerIdle
	default:
		s.State = api.PeerUnknown
	}
	switch {
	case s.Problem != "" || x.sized.IsZero():
	case x.mtu == 0:
		s.Problem = "small packets pass, large ones do not"
	case x.mtu < x.MTU:
		s.Problem = fmt.Sprintf("packets of more than %d bytes do not pass, and pods send up to %d", x.mtu, x.MTU)
	}
}

// Count returns the results of all requests so far.
func (p *Prober) Count() api.Probes {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.count
	c.Seconds = c.Seconds.Clone()
	return c
}

// probeQueue is a heap of targets, the next one first.
type probeQueue []*probed

func (q probeQueue) Len() int           { return len(q) }
func (q probeQueue) Less(i, k int) bool { return q[i].next.Before(q[k].next) }
func (q probeQueue) Swap(i, k int) {
	q[i], q[k] = q[k], q[i]
	q[i].index, q[k].index = i, k
}

// Push implements heap.Interface.
func (q *probeQueue) Push(x any) {
	p := x.(*probed)
	p.index = len(*q)
	*q = append(*q, p)
}

// Pop implements heap.Interface.
func (q *probeQueue) Pop() any {
	last := len(*q) - 1
	p := (*q)[last]
	*q, p.index = (*q)[:last], -1
	return p
}
