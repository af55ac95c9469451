//go:build kubernetes

package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"culvert/subnet"
	"culvert/subnet/contract"
	"culvert/subnet/kube/kubetest"
)

// running is a registry with Hold and Watch running, as in a daemon.
type running struct {
	*Registry
	lease subnet.Lease
	lost  chan error
	stop  func()

	mu       sync.Mutex
	snapshot subnet.Snapshot
	err      error
}

func (c *cluster) join(t *testing.T, node string, change ...func(*Options)) *running {
	t.Helper()
	r := c.open(t, node, change...)
	cfg, err := r.Config(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	claim := contract.Claim(cfg, 1)
	claim.Node = node
	claim.Ends[0].VTEP.MAC = subnet.DeriveMAC(node, 1, false)
	if cfg.Backend.Type != "vxlan" {
		claim.Ends[0].VTEP = subnet.VTEP{}
	}
	acquiring, cancelAcquire := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancelAcquire()
	l, err := r.Acquire(acquiring, claim)
	if err != nil {
		t.Fatal(err)
	}
	x := &running{Registry: r, lease: l, lost: make(chan error, 1)}
	ctx, cancel := context.WithCancel(t.Context())
	var parts sync.WaitGroup
	parts.Go(func() {
		if err := r.Hold(ctx, l); err != nil {
			x.lost <- err
		}
	})
	parts.Go(func() {
		for snapshot, err := range r.Watch(ctx, l) {
			x.mu.Lock()
			if x.err = err; err == nil {
				x.snapshot = snapshot
			}
			x.mu.Unlock()
		}
	})
	x.stop = func() {
		cancel()
		parts.Wait()
	}
	t.Cleanup(x.stop)
	return x
}

func (x *running) await(t *testing.T, what string, ok func(subnet.Snapshot, error) bool) {
	t.Helper()
	eventually(t, what, func() bool {
		x.mu.Lock()
		defer x.mu.Unlock()
		return ok(x.snapshot, x.err)
	})
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timed out after 30 s: %s", what)
		}
	}
}

const prefix = "flannel.alpha.coreos.com/"

// TestNode checks changes of Nodes that flannel does not handle.
func TestNode(t *testing.T) {
	c := start(t)

	t.Run("Acquire waits for a podCIDR", func(t *testing.T) {
		c.empty(t).SetConfig(t, contract.Config)
		var mu sync.Mutex
		var waits []string
		waiting := func(part string) bool {
			mu.Lock()
			defer mu.Unlock()
			return len(waits) > 0 && strings.Contains(waits[len(waits)-1], part)
		}
		r := c.open(t, "a", func(o *Options) {
			o.Waiting = func(why string) {
				mu.Lock()
				defer mu.Unlock()
				waits = append(waits, why)
			}
		})
		got := make(chan subnet.Lease, 1)
		cfg, err := r.Config(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		claim := contract.Claim(cfg, 1)
		claim.Node = "a"
		ctx, cancel := context.WithCancel(t.Context())
		var acquiring sync.WaitGroup
		defer acquiring.Wait()
		defer cancel()
		acquiring.Go(func() {
			if l, err := r.Acquire(ctx, claim); err == nil {
				got <- l
			}
		})
		eventually(t, "waiting for the Node", func() bool { return waiting(`there is no Node "a"`) })
		c.PutNode("a", nil, nil)
		eventually(t, "waiting for a podCIDR", func() bool { return waiting("--allocate-node-cidrs") })
		c.PutNode("a", []string{"10.5.1.0/24"}, nil)
		select {
		case l := <-got:
			if l.Subnets()[0].String() != "10.5.1.0/24" {
				t.Errorf("acquired %v", l)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("Acquire did not return")
		}
		n := c.GetNode("a")
		if n.Metadata.Annotations[prefix+"public-ip"] != "192.0.2.1" || n.Metadata.Annotations[prefix+"backend-type"] != "vxlan" ||
			n.Metadata.Annotations[prefix+"kube-subnet-manager"] != "true" || n.Metadata.Annotations[podCIDRsAnnotation] != n.Metadata.UID+" 10.5.1.0/24" {
			t.Errorf("annotations: %v", n.Metadata.Annotations)
		}
		if len(n.Status.Conditions) != 0 {
			t.Errorf("condition set before the datapath exists: %v", n.Status.Conditions)
		}
	})

	t.Run("Node recreated with the same podCIDR", func(t *testing.T) {
		c.empty(t).SetConfig(t, contract.Config)
		c.PutNode("a", []string{"10.5.1.0/24"}, nil)
		x := c.join(t, "a")
		x.await(t, "a snapshot", func(s subnet.Snapshot, _ error) bool { return s.Revision > 0 })
		eventually(t, "the condition", func() bool {
			n := c.GetNode("a")
			return len(n.Status.Conditions) == 1 && n.Status.Conditions[0].Type == "NetworkUnavailable" && n.Status.Conditions[0].Status == "False"
		})
		c.DeleteNode("a")
		x.await(t, "no new pods", func(s subnet.Snapshot, _ error) bool { return !s.Self.Expires.IsZero() })
		c.PutNode("a", []string{"10.5.1.0/24"}, nil)
		x.await(t, "pods again", func(s subnet.Snapshot, _ error) bool { return s.Self.Expires.IsZero() })
		eventually(t, "annotations and condition again", func() bool {
			n := c.GetNode("a")
			return n.Metadata.Annotations[prefix+"public-ip"] == "192.0.2.1" && len(n.Status.Conditions) == 1
		})
		select {
		case err := <-x.lost:
			t.Errorf("lost: %v", err)
		default:
		}
	})

	t.Run("Node recreated with another podCIDR", func(t *testing.T) {
		c.empty(t).SetConfig(t, contract.Config)
		c.PutNode("a", []string{"10.5.1.0/24"}, nil)
		x := c.join(t, "a")
		x.await(t, "a snapshot", func(s subnet.Snapshot, _ error) bool { return s.Revision > 0 })
		c.DeleteNode("a")
		c.PutNode("a", []string{"10.5.2.0/24"}, nil)
		x.awaitLost(t, "10.5.2.0/24")
		if who, err := x.TakenBy(t.Context(), "a", nil, x.lease.Subnets()); err != nil || !strings.Contains(who, "10.5.2.0/24") {
			t.Errorf("taken by %q, %v", who, err)
		}
		if who, err := x.TakenBy(t.Context(), "a", nil, []netip.Prefix{netip.MustParsePrefix("10.5.2.0/24")}); err != nil || who != "" {
			t.Errorf("its own is taken by %q, %v", who, err)
		}
	})

	t.Run("another Node gets our podCIDR", func(t *testing.T) {
		c.empty(t).SetConfig(t, contract.Config)
		c.PutNode("a", []string{"10.5.1.0/24"}, nil)
		x := c.join(t, "a")
		x.await(t, "a snapshot", func(s subnet.Snapshot, _ error) bool { return s.Revision > 0 })
		c.DeleteNode("a")
		x.await(t, "no new pods", func(s subnet.Snapshot, _ error) bool { return !s.Self.Expires.IsZero() })
		c.PutNode("b", []string{"10.5.1.0/24"}, flannel("192.0.2.2", "02:00:00:00:00:02"))
		x.awaitLost(t, "the Node b")
		if who, err := x.TakenBy(t.Context(), "a", nil, x.lease.Subnets()); err != nil || !strings.Contains(who, "the Node b") {
			t.Errorf("taken by %q, %v", who, err)
		}
	})

	t.Run("a peer's podCIDR changes", func(t *testing.T) {
		c.empty(t).SetConfig(t, contract.Config)
		c.PutNode("a", []string{"10.5.1.0/24"}, nil)
		x := c.join(t, "a")
		same := flannel("192.0.2.2", "02:00:00:00:00:02")
		c.PutNode("b", []string{"10.5.7.0/24"}, same)
		only := func(p string) func(subnet.Snapshot, error) bool {
			return func(s subnet.Snapshot, _ error) bool {
				return len(s.Peers) == 1 && s.Peers[0].Subnets()[0].String() == p
			}
		}
		x.await(t, "the peer", only("10.5.7.0/24"))
		// Everything that flannel compares is unchanged.
		c.DeleteNode("b")
		c.PutNode("b", []string{"10.5.8.0/24"}, same)
		x.await(t, "the peer's new subnet, and not the old one", only("10.5.8.0/24"))
	})

	t.Run("annotations overwritten", func(t *testing.T) {
		c.empty(t).SetConfig(t, contract.Config)
		c.PutNode("a", []string{"10.5.1.0/24"}, nil)
		x := c.join(t, "a")
		x.await(t, "a snapshot", func(s subnet.Snapshot, _ error) bool { return s.Revision > 0 })
		public := func(want string) func() bool {
			return func() bool { return c.GetNode("a").Metadata.Annotations[prefix+"public-ip"] == want }
		}
		c.PutNode("a", nil, map[string]any{prefix + "public-ip": "203.0.113.1", prefix + "backend-data": nil})
		eventually(t, "our annotations are restored", func() bool {
			n := c.GetNode("a").Metadata.Annotations
			return n[prefix+"public-ip"] == "192.0.2.1" && n[prefix+"backend-data"] != ""
		})
		c.PutNode("a", nil, map[string]any{prefix + "public-ip-overwrite": "203.0.113.9"})
		eventually(t, "the overwrite", public("203.0.113.9"))
		c.PutNode("a", nil, map[string]any{prefix + "public-ip-overwrite": "nonsense"})
		x.await(t, "the invalid overwrite is reported", func(_ subnet.Snapshot, err error) bool {
			return err != nil && strings.Contains(err.Error(), "public-ip-overwrite")
		})
		if !public("203.0.113.9")() {
			t.Error("the invalid overwrite replaced the last good address")
		}
		c.PutNode("a", nil, map[string]any{prefix + "public-ip-overwrite": nil})
		eventually(t, "the overwrite is removed", public("192.0.2.1"))
	})

	t.Run("the node's own address", func(t *testing.T) {
		c.empty(t).SetConfig(t, contract.Config)
		waiting := make(chan string, 100)
		r := c.open(t, "a", func(o *Options) {
			o.Waiting = func(why string) {
				select {
				case waiting <- why:
				default:
				}
			}
		})
		got := make(chan string, 1)
		ask := func() {
			t.Helper()
			addrs, err := r.NodeAddrs(t.Context())
			got <- fmt.Sprint(addrs, err)
		}
		await := func(part string) {
			t.Helper()
			eventually(t, part, func() bool { return strings.Contains(<-waiting, part) })
		}
		go ask()
		await(`no Node "a"`)
		c.PutNode("a", []string{"10.5.1.0/24"}, map[string]any{prefix + "node-public-ip": "2001:db8::7"})
		await(prefix + "node-public-ip")
		c.PutNode("a", nil, map[string]any{prefix + "node-public-ip": "192.0.2.7", prefix + "node-public-ipv6": "2001:db8::7"})
		if s := <-got; s != "[192.0.2.7 2001:db8::7] <nil>" {
			t.Error(s)
		}
		c.PutNode("a", nil, map[string]any{prefix + "node-public-ip": nil, prefix + "node-public-ipv6": nil})
		ask()
		if s := <-got; s != "[] <nil>" {
			t.Error(s)
		}
	})

	t.Run("a node claims another's podCIDR", func(t *testing.T) {
		c.empty(t).SetConfig(t, contract.Config)
		// The thief is the oldest Node, so it would win a conflict.
		c.PutNode("thief", []string{"10.5.9.0/24"}, flannel("192.0.2.9", "02:00:00:00:00:09"))
		c.PutNode("a", []string{"10.5.1.0/24"}, nil)
		c.PutNode("b", []string{"10.5.8.0/24"}, flannel("192.0.2.2", "02:00:00:00:00:02"))
		c.PutNode("b", nil, map[string]any{podCIDRsAnnotation: c.GetNode("b").Metadata.UID + " 10.5.8.0/24"})
		claim := func(cidr string) {
			c.PutNode("thief", nil, map[string]any{podCIDRsAnnotation: c.GetNode("thief").Metadata.UID + " " + cidr})
		}
		honest := func(s subnet.Snapshot, _ error) bool {
			return len(s.Peers) == 2 && s.Peers[0].String() == `10.5.8.0/24 (node "b", 192.0.2.2)` && s.Peers[1].String() == `10.5.9.0/24 (node "thief", 192.0.2.9)`
		}
		claim("10.5.8.0/24") // before the first list
		x := c.join(t, "a")
		x.await(t, "the list", honest)
		for _, cidr := range []string{"10.5.0.0/16", "10.5.1.0/24", "10.5.8.128/25"} {
			before := x.mirrorRevision()
			claim(cidr)
			x.await(t, "the event of "+cidr, func(subnet.Snapshot, error) bool { return x.mirrorRevision() > before })
			x.await(t, cidr+" is rejected", honest)
		}
		// Until the owner exists, only the thief claims the podCIDR.
		c.DeleteNode("b")
		claim("10.5.8.0/24")
		x.stop()
		y := c.join(t, "a")
		y.await(t, "the only claimant", func(s subnet.Snapshot, _ error) bool { return len(s.Peers) == 1 })
		c.PutNode("b", []string{"10.5.8.0/24"}, flannel("192.0.2.2", "02:00:00:00:00:02"))
		y.await(t, "the owner", honest)
	})

	t.Run("one family of two changes", func(t *testing.T) {
		c.empty(t).SetConfig(t, `{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"host-gw"}}`)
		c.PutNode("a", []string{"10.5.1.0/24", "fd00:5:0:1::/64"}, nil)
		r := c.open(t, "a")
		cfg, err := r.Config(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		l, err := r.Acquire(t.Context(), subnet.Claim{Node: "a", Config: cfg, Ends: []subnet.Endpoint{{Public: netip.MustParseAddr("192.0.2.1")}, {Public: netip.MustParseAddr("2001:db8::1")}}})
		if err != nil {
			t.Fatal(err)
		}
		annotations := map[string]any{
			prefix + "kube-subnet-manager": "true", prefix + "backend-type": "host-gw", prefix + "backend-data": "null",
			prefix + "public-ip": "192.0.2.2", prefix + "public-ipv6": "2001:db8::2", prefix + "backend-v6-data": "null",
		}
		c.PutNode("b", []string{"10.5.2.0/24", "fd00:5:0:2::/64"}, annotations)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		for s, err := range r.Watch(ctx, l) {
			if err != nil || len(s.Peers) == 0 {
				continue
			}
			switch s.Peers[0].Publics()[0].String() {
			case "192.0.2.2":
				c.PutNode("b", nil, map[string]any{prefix + "public-ip": "192.0.2.3"})
				continue
			case "192.0.2.3":
				if p := s.Peers[0]; len(p.Endpoints) != 2 || p.Publics()[1].String() != "2001:db8::2" {
					t.Errorf("%v", p)
				}
			}
			cancel()
		}
		if !errors.Is(ctx.Err(), context.Canceled) {
			t.Error("the changed address was not in a snapshot")
		}
	})

	t.Run("token rejected and renewed", func(t *testing.T) {
		c.empty(t).SetConfig(t, contract.Config)
		c.PutNode("a", []string{"10.5.1.0/24"}, nil)
		x := c.join(t, "a")
		x.await(t, "a snapshot", func(s subnet.Snapshot, _ error) bool { return s.Revision > 0 })
		c.setToken(t, "wrong")
		x.c.mu.Lock()
		x.c.read = time.Time{} // as if tokenEvery had passed
		x.c.mu.Unlock()
		x.c.breakAll()
		x.await(t, "the error", func(s subnet.Snapshot, err error) bool { return err != nil && strings.Contains(err.Error(), "401") })
		c.setToken(t, kubetest.CulvertToken)
		c.PutNode("b", []string{"10.5.8.0/24"}, flannel("192.0.2.2", "02:00:00:00:00:02"))
		x.await(t, "the renewed token is used", func(s subnet.Snapshot, err error) bool { return err == nil && len(s.Peers) == 1 })
	})

	t.Run("missing permissions", func(t *testing.T) {
		c.empty(t).SetConfig(t, contract.Config)
		c.PutNode("a", []string{"10.5.1.0/24"}, nil)
		c.setToken(t, kubetest.NobodyToken)
		named := make(chan string, 100)
		r := c.open(t, "a", func(o *Options) {
			o.Waiting = func(why string) {
				select {
				case named <- why:
				default:
				}
			}
		})
		cfg, err := r.Config(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		if l, err := r.Acquire(ctx, contract.Claim(cfg, 1)); err == nil {
			t.Errorf("acquired %v", l)
		}
		if why := <-named; !strings.Contains(why, "403") || !strings.Contains(why, "ClusterRole") {
			t.Errorf("waiting for %q", why)
		}
	})

	t.Run("the manifests grant no other permissions", func(t *testing.T) {
		r := c.open(t, "a")
		for path, method := range map[string]string{
			"/api/v1/pods": http.MethodGet, "/api/v1/secrets": http.MethodGet, "/api/v1/configmaps": http.MethodGet,
			"/api/v1/nodes/a": http.MethodPatch, "/api/v1/namespaces": http.MethodGet,
		} {
			err := r.c.call(t.Context(), request{method: method, path: path, accept: whole, contentType: "application/merge-patch+json", body: []byte("{}")}, nil)
			if !has(err, http.StatusForbidden) {
				t.Errorf("%s %s: %v", method, path, err)
			}
		}
	})

	t.Run("a daemon can patch only its own Node", func(t *testing.T) {
		c.empty(t)
		c.PutNode("a", nil, nil)
		c.PutNode("b", nil, nil)
		c.apply(t, "own-node.yaml")
		var token struct{ Status struct{ Token string } }
		answer := c.Do(http.MethodPost, "/api/v1/namespaces/culvert/serviceaccounts/culvert/token", "application/json",
			`{"apiVersion":"authentication.k8s.io/v1","kind":"TokenRequest","spec":{"boundObjectRef":{"kind":"Node","apiVersion":"v1","name":"a"}}}`)
		if err := json.Unmarshal(answer, &token); err != nil {
			t.Fatal(err)
		}
		c.setToken(t, token.Status.Token)
		r := c.open(t, "a")
		write := func(node string) error {
			var p patch
			value := "y"
			p.Metadata.UID, p.Metadata.Annotations = c.GetNode(node).Metadata.UID, map[string]*string{"x": &value}
			return r.c.patchStatus(t.Context(), node, p)
		}
		// The policy takes effect some time after it was applied.
		eventually(t, "the other Node is refused", func() bool {
			err := write("b")
			return err != nil && strings.Contains(err.Error(), "of the Node that it runs on")
		})
		if err := write("a"); err != nil {
			t.Error(err)
		}
	})

	t.Run("410 Gone", func(t *testing.T) {
		c.empty(t).SetConfig(t, contract.Config)
		c.PutNode("a", []string{"10.5.1.0/24"}, nil)
		r := c.open(t, "a")
		// A restarted API server does not know earlier revisions.
		c.Stop(t)
		c.Start(t)
		err := r.c.watch(t.Context(), "1", time.Minute, func() {}, func(*event) error { return errors.New("an event") })
		if !has(err, http.StatusGone) {
			t.Errorf("a watch from revision 1: %v", err)
		}
	})

	t.Run("restart of the API server with many Nodes", func(t *testing.T) {
		c.empty(t).SetConfig(t, contract.Config)
		c.PutNode("a", []string{"10.5.1.0/24"}, nil)
		for n := range 40 { // more than fewUnknown
			c.PutNode("p"+string(rune('0'+n/10))+string(rune('0'+n%10)), []string{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 5, byte(100 + n), 0}), 24).String()},
				flannel(netip.AddrFrom4([4]byte{198, 51, 100, byte(n + 1)}).String(), subnet.DeriveMAC("p", uint32(n), false).String()))
		}
		x := c.join(t, "a")
		x.await(t, "all peers", func(s subnet.Snapshot, _ error) bool { return len(s.Peers) == 40 })
		c.Stop(t)
		x.await(t, "the error", func(s subnet.Snapshot, err error) bool { return err != nil && len(s.Peers) == 40 })
		c.Start(t)
		c.DeleteNode("p00")
		x.await(t, "the change", func(s subnet.Snapshot, err error) bool { return err == nil && len(s.Peers) == 39 })
	})
}

func (x *running) awaitLost(t *testing.T, part string) {
	t.Helper()
	select {
	case err := <-x.lost:
		if !errors.Is(err, subnet.ErrLost) || !strings.Contains(err.Error(), part) {
			t.Errorf("lost: %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("Hold did not return")
	}
}

// TestOlderState restores the store to an earlier state: the peers are kept until
// their nodes return, and the watch does not wait for a revision in the future.
func TestOlderState(t *testing.T) {
	c := start(t)
	c.SetConfig(t, contract.Config)
	c.PutNode("a", []string{"10.5.1.0/24"}, nil)
	c.PutNode("b", []string{"10.5.8.0/24"}, flannel("192.0.2.2", "02:00:00:00:00:02"))
	dir := t.TempDir()
	x := c.join(t, "a", func(o *Options) {
		o.Settle, o.SnapshotFile = 3*time.Second, filepath.Join(dir, "snapshot.json")
	})
	x.await(t, "the peer", func(s subnet.Snapshot, _ error) bool { return len(s.Peers) == 1 })
	for range 50 { // so that the fresh store is at a lower revision
		c.PutNode("b", nil, map[string]any{"x": time.Now().String()})
	}
	x.await(t, "their revision", func(s subnet.Snapshot, _ error) bool { return x.mirrorRevision() > 50 })

	c.Stop(t)
	fresh := kubetest.Start(t, "")
	fresh.Stop()
	c.Become(fresh)
	x.await(t, "the error", func(_ subnet.Snapshot, err error) bool { return err != nil })
	c.Start(t)
	c.grant(t)
	c.PutNode("a", []string{"10.5.1.0/24"}, nil)
	eventually(t, "our annotations", func() bool { return c.GetNode("a").Metadata.Annotations[prefix+"public-ip"] == "192.0.2.1" })
	c.PutNode("d", []string{"10.5.9.0/24"}, flannel("192.0.2.4", "02:00:00:00:00:04"))
	x.await(t, "the old peer beside the new one", func(s subnet.Snapshot, err error) bool { return err == nil && len(s.Peers) == 2 })
	x.await(t, "it is removed after the settle time", func(s subnet.Snapshot, err error) bool {
		return err == nil && len(s.Peers) == 1 && s.Peers[0].Node == "d"
	})
}

func (x *running) mirrorRevision() int64 {
	x.Registry.mu.Lock()
	m := x.mirror
	x.Registry.mu.Unlock()
	if m == nil {
		return 0
	}
	return m.last()
}
