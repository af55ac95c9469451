package etcd

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"culvert/subnet"
	"culvert/subnet/etcd/etcdtest"
	"culvert/subnet/etcd/member"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const vxlanConfig = `{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}`

// open makes a registry that ends with the test.
func open(t *testing.T, endpoint string, change ...func(*Options)) *Registry {
	t.Helper()
	o := Options{Endpoints: []string{endpoint}, Logger: slog.New(slog.DiscardHandler), RequestTimeout: 2 * time.Second}
	for _, c := range change {
		c(&o)
	}
	r, err := New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func withState(file string) func(*Options) { return func(o *Options) { o.StateFile = file } }

// claim is node number n's: 192.0.2.n, or 198.51.100.n past 254.
func claim(t *testing.T, config string, n int) subnet.Claim {
	t.Helper()
	cfg, _, err := subnet.ParseConfig([]byte(config))
	if err != nil {
		t.Fatal(err)
	}
	c := subnet.Claim{Node: fmt.Sprintf("node-%d", n), Config: cfg, TTL: 30 * time.Second}
	for _, network := range cfg.Networks {
		public := netip.AddrFrom4([4]byte{192, 0, 2, byte(n)})
		is6 := network.Prefix.Addr().Is6()
		if is6 {
			public = netip.MustParseAddr(fmt.Sprintf("2001:db8::%x", n))
		}
		c.Ends = append(c.Ends, subnet.Endpoint{
			Public: public,
			VTEP:   subnet.VTEP{VNI: cfg.Backend.VNI, MAC: subnet.DeriveMAC(c.Node, cfg.Backend.VNI, is6)},
		})
	}
	return c
}

// eventually polls for what another goroutine brings about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

// Fifty nodes ask at one moment; each has a connection of its own.
func TestRacingNodesNeverShareASubnet(t *testing.T) {
	endpoint := etcdtest.Start(t)
	for name, config := range map[string]string{
		"ipv4": `{"Network":"10.5.0.0/18","SubnetMax":"10.5.50.0"}`,
		"dual": `{"Network":"10.6.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:12::/56"}`,
	} {
		t.Run(name, func(t *testing.T) {
			const nodes = 50
			leases := make([]subnet.Lease, nodes)
			registries := make([]*Registry, nodes)
			for i := range registries {
				registries[i] = open(t, endpoint, func(o *Options) { o.Prefix = "/race/" + name })
			}
			var racing sync.WaitGroup
			start := make(chan struct{})
			for i, r := range registries {
				c := claim(t, config, i+1)
				racing.Go(func() {
					<-start
					l, err := r.Acquire(t.Context(), c)
					if err != nil {
						t.Errorf("node %d: %v", i, err)
					}
					leases[i] = l
				})
			}
			began := time.Now()
			close(start)
			racing.Wait()
			t.Logf("%d nodes in %v", nodes, time.Since(began).Round(time.Millisecond))
			for i, a := range leases {
				for _, b := range leases[:i] {
					if a.Overlaps(b) {
						t.Errorf("%s and %s", a, b)
					}
				}
			}
			entries, _, err := registries[0].Entries(t.Context(), false)
			if err != nil || len(entries) != nodes {
				t.Errorf("%d entries, %v", len(entries), err)
			}
		})
	}
}

func TestLifeOfALease(t *testing.T) {
	server := etcdtest.StartServer(t, member.Options{})
	stateFile := filepath.Join(t.TempDir(), "lease.json")
	r := open(t, server.URL(), withState(stateFile))
	if _, err := r.SetConfig(t.Context(), []byte(vxlanConfig), 0); err != nil {
		t.Fatal(err)
	}
	cfg, err := r.Config(t.Context())
	if err != nil || cfg.Backend.Type != "vxlan" {
		t.Fatal(cfg, err)
	}
	l, err := r.Acquire(t.Context(), claim(t, vxlanConfig, 1))
	if err != nil {
		t.Fatal(err)
	}

	// A second node comes, changes, goes.
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := r.Hold(ctx, l); err != nil {
			t.Errorf("hold: %v", err)
		}
	})
	snapshots := make(chan subnet.Snapshot, 100)
	running.Go(func() {
		for s, err := range r.Watch(ctx, l) {
			if err == nil {
				snapshots <- s
			}
		}
	})
	defer running.Wait()
	defer cancel()
	expect := func(what string, ok func(subnet.Snapshot) bool) {
		t.Helper()
		for {
			select {
			case s := <-snapshots:
				if ok(s) {
					return
				}
			case <-time.After(10 * time.Second):
				t.Fatalf("no snapshot with %s", what)
			}
		}
	}
	expect("ourselves alone", func(s subnet.Snapshot) bool { return len(s.Peers) == 0 && s.Self.Key() == l.Key() })

	other := open(t, server.URL())
	l2, err := other.Acquire(t.Context(), claim(t, vxlanConfig, 2))
	if err != nil {
		t.Fatal(err)
	}
	expect("the peer", func(s subnet.Snapshot) bool { return len(s.Peers) == 1 && s.Peers[0].Node == "node-2" })
	moved := l2
	moved.Endpoints = []subnet.Endpoint{l2.Endpoints[0]}
	moved.Endpoints[0].Public = netip.MustParseAddr("192.0.2.222")
	if _, err := other.Update(t.Context(), moved); err != nil {
		t.Fatal(err)
	}
	expect("its new address", func(s subnet.Snapshot) bool {
		return len(s.Peers) == 1 && s.Peers[0].Endpoints[0].Public == moved.Endpoints[0].Public
	})
	if err := other.Release(t.Context(), l2); err != nil {
		t.Fatal(err)
	}
	expect("no peer", func(s subnet.Snapshot) bool { return len(s.Peers) == 0 })

	// The node is killed and comes back, under another address, too.
	for _, n := range []byte{1, 77} {
		again := open(t, server.URL(), withState(stateFile))
		c := claim(t, vxlanConfig, 1)
		c.Ends[0].Public = netip.AddrFrom4([4]byte{192, 0, 2, n})
		back, err := again.Acquire(t.Context(), c)
		if err != nil || back.Key() != l.Key() || back.ID != l.ID {
			t.Fatalf("came back to %v, %v; held %v", back, err, l)
		}
	}
}
