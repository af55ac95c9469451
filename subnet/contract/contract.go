// Package contract tests what every lease store must provide: configuration,
// complete snapshots, updates, and operation while the store is unreachable. It
// keeps no state; each store's own tests call Run with their store.
package contract

import (
	"context"
	"net/netip"
	"sync"
	"testing"
	"time"

	"culvert/subnet"
	"culvert/subnet/kept"
)

// Store is a store under test.
type Store interface {
	// SetConfig writes the text, valid or not, as the network configuration.
	SetConfig(t *testing.T, text string)
	// Open returns a registry for node n that persists to dir. Opening the same
	// directory again simulates a restart.
	Open(t *testing.T, n int, dir string) subnet.Registry
	// PutPeer writes the lease of PeerSubnet(n) with this address, as another
	// program would; SpoilPeer makes it malformed; DropPeer deletes it.
	PutPeer(t *testing.T, n int, public netip.Addr)
	SpoilPeer(t *testing.T, n int)
	DropPeer(t *testing.T, n int)
}

// Remote is a store that can be stopped, and whose registries persist a copy.
type Remote interface {
	Store
	Stop(t *testing.T)
	Start(t *testing.T)
}

// Keeper is a registry of a Remote.
type Keeper interface {
	subnet.Registry
	Held() (subnet.Lease, bool)
	Kept(node string) (*kept.State, error)
	Resume(k *kept.State, ttl time.Duration)
	Answers(ctx context.Context) error
}

// Config is the network configuration of the tests.
const Config = `{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}`

// PeerSubnet returns the subnet of peer n.
func PeerSubnet(n int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 5, byte(200 + n), 0}), 24)
}

// PeerMAC returns the VTEP address of peer n.
func PeerMAC(n int) subnet.MAC { return subnet.MAC{2, 0, 0, 0, 1, byte(n)} }

// NodeName returns the identity of node n.
func NodeName(n int) string { return "node-" + string(rune('0'+n)) }

// Claim returns the claim of node n.
func Claim(cfg subnet.Config, n int) subnet.Claim {
	name := NodeName(n)
	return subnet.Claim{
		Node: name, Config: cfg, TTL: 30 * time.Second,
		Ends: []subnet.Endpoint{{
			Public: netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}),
			VTEP:   subnet.VTEP{VNI: cfg.Backend.VNI, MAC: subnet.DeriveMAC(name, cfg.Backend.VNI, false)},
		}},
	}
}

// Run runs the parts of the contract that hold for every store, each with a new one.
func Run(t *testing.T, open func(t *testing.T) Store) {
	t.Run("configuration", func(t *testing.T) { configuration(t, open(t)) })
	t.Run("configuration changes", func(t *testing.T) { configurationChanges(t, open(t)) })
	t.Run("whole snapshots", func(t *testing.T) { wholeSnapshots(t, open(t)) })
	t.Run("update and release", func(t *testing.T) { updateAndRelease(t, open(t)) })
}

// RunRemote runs all parts of the contract, each with a new store.
func RunRemote(t *testing.T, open func(t *testing.T) Remote) {
	Run(t, func(t *testing.T) Store { return open(t) })
	t.Run("fail static", func(t *testing.T) { failStatic(t, open(t)) })
	t.Run("kept on disk", func(t *testing.T) { keptOnDisk(t, open(t)) })
}

// A node waits for a valid configuration; it does not accept an invalid one.
func configuration(t *testing.T, s Store) {
	r := s.Open(t, 1, t.TempDir())
	type answer struct {
		cfg subnet.Config
		err error
	}
	got := make(chan answer, 1)
	go func() {
		cfg, err := r.Config(t.Context())
		got <- answer{cfg, err}
	}()
	quiet := func(what string) {
		select {
		case a := <-got:
			t.Fatalf("%s: %+v, %v", what, a.cfg, a.err)
		case <-time.After(150 * time.Millisecond):
		}
	}
	quiet("without a configuration")
	s.SetConfig(t, `{"Network":"10.5.0.0/40"}`)
	quiet("with an invalid one")
	s.SetConfig(t, Config)
	select {
	case a := <-got:
		if a.err != nil || len(a.cfg.Networks) != 1 || a.cfg.Networks[0].Prefix.String() != "10.5.0.0/16" || a.cfg.Backend.Type != "vxlan" {
			t.Errorf("%+v, %v", a.cfg, a.err)
		}
	case <-time.After(20 * time.Second):
		t.Error("the configuration was not returned")
	}
}

// A running node applies a larger network, and keeps the last configuration if
// it cannot apply the new one.
func configurationChanges(t *testing.T, s Store) {
	n := join(t, s, 1, t.TempDir())
	n.await(t, "a snapshot", func(x subnet.Snapshot) bool { return x.ConfigRefused == "" })
	s.SetConfig(t, `{"Network":"10.4.0.0/15","Backend":{"Type":"vxlan"}}`)
	n.await(t, "the larger network", func(x subnet.Snapshot) bool { return x.Config.Networks[0].Prefix.String() == "10.4.0.0/15" })
	s.SetConfig(t, `{"Network":"10.9.0.0/16","Backend":{"Type":"vxlan"}}`)
	n.await(t, "a network without our subnet is refused", func(x subnet.Snapshot) bool {
		return x.ConfigRefused != "" && x.Config.Networks[0].Prefix.String() == "10.4.0.0/15"
	})
	s.SetConfig(t, Config)
	n.await(t, "the first network again", func(x subnet.Snapshot) bool {
		return x.ConfigRefused == "" && x.Config.Networks[0].Prefix.String() == "10.5.0.0/16"
	})
}

// Every snapshot contains all peers; a malformed lease affects no other.
func wholeSnapshots(t *testing.T, s Store) {
	for n := range 3 {
		s.PutPeer(t, n, netip.AddrFrom4([4]byte{198, 51, 100, byte(n + 1)}))
	}
	a := join(t, s, 1, t.TempDir())
	a.await(t, "three peers in one snapshot", func(x subnet.Snapshot) bool { return len(x.Peers) == 3 && len(x.Rejected) == 0 })
	for i, p := range a.last().Peers {
		if p.Subnets()[0] != PeerSubnet(i) || p.Endpoints[0].VTEP.MAC != PeerMAC(i) || p.Backend != "vxlan" {
			t.Errorf("peer %d is %+v", i, p)
		}
	}
	b := join(t, s, 2, t.TempDir())
	a.await(t, "the node that joins", func(x subnet.Snapshot) bool { return len(x.Peers) == 4 })
	b.await(t, "all other nodes", func(x subnet.Snapshot) bool { return len(x.Peers) == 4 })
	moved := netip.MustParseAddr("198.51.100.77")
	s.PutPeer(t, 0, moved)
	a.await(t, "the new address", func(x subnet.Snapshot) bool {
		l, ok := peer(x, PeerSubnet(0))
		return ok && l.Publics()[0] == moved && len(x.Peers) == 4
	})
	s.SpoilPeer(t, 1)
	a.await(t, "only the malformed lease is rejected", func(x subnet.Snapshot) bool { return len(x.Peers) == 3 && len(x.Rejected) == 1 })
	s.PutPeer(t, 1, netip.MustParseAddr("198.51.100.2"))
	a.await(t, "the repaired lease is a peer again", func(x subnet.Snapshot) bool { return len(x.Peers) == 4 && len(x.Rejected) == 0 })
	s.DropPeer(t, 2)
	a.await(t, "the deleted lease is no peer", func(x subnet.Snapshot) bool {
		_, ok := peer(x, PeerSubnet(2))
		return !ok && len(x.Peers) == 3
	})
}

// Other nodes see a node's update and its release.
func updateAndRelease(t *testing.T, s Store) {
	a, b := join(t, s, 1, t.TempDir()), join(t, s, 2, t.TempDir())
	own := a.lease.Subnets()[0]
	b.await(t, "the other node", func(x subnet.Snapshot) bool { _, ok := peer(x, own); return ok })
	moved := a.lease
	moved.Endpoints = []subnet.Endpoint{moved.Endpoints[0]}
	moved.Endpoints[0].Public = netip.MustParseAddr("192.0.2.201")
	after, err := a.registry.Update(t.Context(), moved)
	if err != nil || after.Publics()[0] != moved.Publics()[0] || after.Subnets()[0] != own {
		t.Fatalf("%v, %v", after, err)
	}
	b.await(t, "its new address", func(x subnet.Snapshot) bool {
		l, ok := peer(x, own)
		return ok && l.Publics()[0] == moved.Publics()[0] && l.Node == NodeName(1)
	})
	a.stop() // as the daemon does first
	if err := a.registry.Release(t.Context(), after); err != nil {
		t.Fatal(err)
	}
	b.await(t, "the released lease is no peer", func(x subnet.Snapshot) bool { _, ok := peer(x, own); return !ok })
}

// While the store is unreachable the last snapshot remains valid, the lease is
// held and Watch yields an error. Afterwards Watch yields changes again.
func failStatic(t *testing.T, s Remote) {
	s.PutPeer(t, 0, netip.MustParseAddr("198.51.100.1"))
	n := join(t, s, 1, t.TempDir())
	n.await(t, "a peer", func(x subnet.Snapshot) bool { return len(x.Peers) == 1 })
	before := n.last().Revision
	s.Stop(t)
	n.awaitError(t)
	if x := n.last(); len(x.Peers) != 1 || x.Revision < before {
		t.Errorf("while the store is unreachable: %+v", x)
	}
	s.Start(t)
	s.PutPeer(t, 1, netip.MustParseAddr("198.51.100.2"))
	n.await(t, "a change after it", func(x subnet.Snapshot) bool { return len(x.Peers) == 2 })
	select {
	case err := <-n.lost:
		t.Errorf("the lease was lost: %v", err)
	default:
	}
}

// A registry opened while the store is unreachable starts from the saved state,
// and follows the store once it is reachable.
func keptOnDisk(t *testing.T, s Remote) {
	dir := t.TempDir()
	s.PutPeer(t, 0, netip.MustParseAddr("198.51.100.1"))
	s.PutPeer(t, 1, netip.MustParseAddr("198.51.100.2"))
	first := join(t, s, 1, dir)
	first.await(t, "two peers", func(x subnet.Snapshot) bool { return len(x.Peers) == 2 })
	eventually(t, "they are saved", func() bool {
		k, err := first.registry.(Keeper).Kept(NodeName(1))
		return err == nil && k != nil && len(k.Entries) == 3
	})
	first.stop()
	s.Stop(t)

	r := s.Open(t, 1, dir).(Keeper)
	asking, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	if err := r.Answers(asking); err == nil {
		t.Error("Answers returned nil for a stopped store")
	}
	cancel()
	k, err := r.Kept(NodeName(1))
	if err != nil || k == nil {
		t.Fatalf("kept: %v, %v", k, err)
	}
	if other, err := r.Kept(NodeName(2)); err == nil {
		t.Errorf("the state of another node is used: %+v", other)
	}
	r.Resume(k, 30*time.Second)
	second := follow(t, r, k.Lease)
	second.await(t, "the kept leases", func(x subnet.Snapshot) bool {
		return !x.Kept.IsZero() && len(x.Peers) == 2 && x.Self.Key() == first.lease.Key()
	})
	s.Start(t)
	second.await(t, "the store's", func(x subnet.Snapshot) bool { return x.Kept.IsZero() && len(x.Peers) == 2 })
	s.DropPeer(t, 1)
	second.await(t, "a change", func(x subnet.Snapshot) bool { return len(x.Peers) == 1 })
	if held, ok := r.Held(); !ok || held.Key() != first.lease.Key() {
		t.Errorf("held: %v", held)
	}
}

// node is a registry with a held lease and a running watch.
type node struct {
	registry subnet.Registry
	lease    subnet.Lease
	lost     chan error
	stop     func()

	mu        sync.Mutex
	snapshots int
	snapshot  subnet.Snapshot
	err       error
}

// join sets the configuration, acquires a lease, and runs Hold and Watch.
func join(t *testing.T, s Store, n int, dir string) *node {
	t.Helper()
	s.SetConfig(t, Config)
	r := s.Open(t, n, dir)
	cfg, err := r.Config(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l, err := r.Acquire(t.Context(), Claim(cfg, n))
	if err != nil {
		t.Fatal(err)
	}
	if l.Node != NodeName(n) || cfg.Admits(l) != nil {
		t.Fatalf("acquired %v", l)
	}
	return follow(t, r, l)
}

func follow(t *testing.T, r subnet.Registry, l subnet.Lease) *node {
	ctx, cancel := context.WithCancel(t.Context())
	n := &node{registry: r, lease: l, lost: make(chan error, 1)}
	var running sync.WaitGroup
	running.Go(func() {
		if err := r.Hold(ctx, l); err != nil {
			n.lost <- err
		}
	})
	running.Go(func() {
		for snapshot, err := range r.Watch(ctx, l) {
			n.mu.Lock()
			if n.err = err; err == nil {
				n.snapshot = snapshot
				n.snapshots++
			}
			n.mu.Unlock()
		}
	})
	n.stop = func() {
		cancel()
		running.Wait()
	}
	t.Cleanup(n.stop)
	return n
}

func (n *node) last() subnet.Snapshot {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.snapshot
}

func (n *node) await(t *testing.T, what string, ok func(subnet.Snapshot) bool) {
	t.Helper()
	eventually(t, what, func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.snapshots > 0 && ok(n.snapshot)
	})
}

func (n *node) awaitError(t *testing.T) {
	t.Helper()
	eventually(t, "an error is yielded", func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.err != nil
	})
}

func peer(x subnet.Snapshot, p netip.Prefix) (subnet.Lease, bool) {
	for _, l := range x.Peers {
		if l.Subnets()[0] == p {
			return l, true
		}
	}
	return subnet.Lease{}, false
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(40 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timed out after 40 s: %s", what)
		}
	}
}
