package etcd

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"culvert/subnet"
	"culvert/subnet/etcd/etcdtest"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	// The tests mostly wait, for etcd and for time to pass: run more of them at once
	// than there are processors. -parallel on the command line overrides this.
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(sharing{m})
}

// shared is a server for the tests that need none of their own.
var shared etcdtest.Shared

// sharing runs the tests and stops shared after them.
type sharing struct{ *testing.M }

func (m sharing) Run() int {
	defer shared.Stop()
	return m.M.Run()
}

// share returns the URL of shared, where open gives each test a prefix of its own.
func share(t *testing.T) string { return shared.URL(t) }

// at sets a prefix for a part of the test.
func at(t *testing.T, part string) func(*Options) {
	return func(o *Options) { o.Prefix = ownPrefix(t) + "-" + part }
}

func ownPrefix(t *testing.T) string {
	name, _, _ := strings.Cut(t.Name(), "/")
	return "/" + name
}

const vxlanConfig = `{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}`

// open returns a registry that is closed when the test ends.
func open(t *testing.T, endpoint string, change ...func(*Options)) *Registry {
	t.Helper()
	o := Options{Endpoints: []string{endpoint}, Logger: slog.New(slog.DiscardHandler), RequestTimeout: 2 * time.Second}
	if endpoint == shared.URL(t) {
		o.Prefix = ownPrefix(t)
	}
	for _, c := range change {
		c(&o)
	}
	r, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func withState(file string) func(*Options) { return func(o *Options) { o.StateFile = file } }

// claim returns the claim of node-n, at 192.0.2.n and 2001:db8::n.
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

// eventually polls until ok returns true.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	within(t, 10*time.Second, what, ok)
}

func within(t *testing.T, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timed out after %v: %s", limit, what)
		}
	}
}

// Fifty nodes (twenty with -short) acquire at the same time, each with its own
// connection.
func TestRacingNodesNeverShareASubnet(t *testing.T) {
	t.Parallel()
	endpoint := etcdtest.Start(t)
	for name, config := range map[string]string{
		"ipv4": `{"Network":"10.5.0.0/18","SubnetMax":"10.5.50.0"}`,
		"dual": `{"Network":"10.6.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:12::/56"}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nodes := 50
			if testing.Short() {
				nodes = 20
			}
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

func acquire(t *testing.T, r *Registry, c subnet.Claim) subnet.Lease {
	t.Helper()
	l, err := r.Acquire(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// put writes a key without an etcd lease, as another program would.
func put(t *testing.T, r *Registry, key, value string) {
	t.Helper()
	if _, err := r.client.Put(t.Context(), r.opts.Prefix+"/"+key, value); err != nil {
		t.Fatal(err)
	}
}

func setConfig(t *testing.T, r *Registry, text string) {
	t.Helper()
	if _, err := r.SetConfig(t.Context(), []byte(text), subnet.AnyRevision); err != nil {
		t.Fatal(err)
	}
}

// movedTo returns the lease with another public IPv4 address.
func movedTo(l subnet.Lease, public string) subnet.Lease {
	l.Endpoints = slices.Clone(l.Endpoints)
	l.Endpoints[0].Public = netip.MustParseAddr(public)
	return l
}

func TestLeaseLifecycle(t *testing.T) {
	t.Parallel()
	endpoint := share(t)
	stateFile := filepath.Join(t.TempDir(), "lease.json")
	r := open(t, endpoint, withState(stateFile))
	setConfig(t, r, vxlanConfig)
	if cfg, err := r.Config(t.Context()); err != nil || cfg.Backend.Type != "vxlan" {
		t.Fatal(cfg, err)
	}
	l := acquire(t, r, claim(t, vxlanConfig, 1))
	lost := hold(t, r, l)
	w := watch(t, r, l)
	eventually(t, "ourselves", func() bool { return w.last().Self.Key() == l.Key() && len(w.last().Peers) == 0 })

	// A second node joins, changes its address, and leaves.
	other := open(t, endpoint)
	l2 := acquire(t, other, claim(t, vxlanConfig, 2))
	eventually(t, "the peer", func() bool { p := w.last().Peers; return len(p) == 1 && p[0].Node == "node-2" })
	if _, err := other.Update(t.Context(), movedTo(l2, "192.0.2.222")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its new address", func() bool {
		p := w.last().Peers
		return len(p) == 1 && p[0].Endpoints[0].Public.String() == "192.0.2.222" && p[0].CreateRevision == l2.CreateRevision
	})
	if _, err := other.Update(t.Context(), movedTo(l2, "192.0.2.1")); !errors.Is(err, subnet.ErrConflict) {
		t.Errorf("accepted our address: %v", err)
	}
	if err := other.Release(t.Context(), l2); err != nil {
		t.Fatal(err)
	}
	eventually(t, "no peer", func() bool { return len(w.last().Peers) == 0 })

	// The node restarts, the second time with another address.
	for _, public := range []string{"192.0.2.1", "192.0.2.77"} {
		again := open(t, endpoint, withState(stateFile))
		c := claim(t, vxlanConfig, 1)
		c.Ends[0].Public = netip.MustParseAddr(public)
		back, err := again.Acquire(t.Context(), c)
		if err != nil || back.Key() != l.Key() || back.ID != l.ID {
			t.Fatalf("got %v, %v after a restart; held %v", back, err, l)
		}
	}
	select {
	case err := <-lost:
		t.Errorf("Hold returned %v", err)
	default:
	}
	if _, errs := w.count(); errs != 0 {
		t.Errorf("%d errors while etcd was reachable", errs)
	}
}
