package etcd

import (
	"errors"
	"runtime"
	"testing"
	"time"

	"culvert/subnet"
	"culvert/subnet/etcd/etcdtest"
	"culvert/subnet/etcd/member"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// stands checks that Hold is running and that our key is in etcd with a live lease.
func stands(t *testing.T, r *Registry, l subnet.Lease, lost <-chan error) {
	t.Helper()
	select {
	case err := <-lost:
		t.Fatalf("Hold returned %v", err)
	default:
	}
	held, _ := r.Held()
	entries, _, err := r.Entries(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Key == l.Key() {
			if is, err := e.Lease(); err != nil || is.Node != l.Node || e.ID != held.ID || time.Until(e.Expires) < 0 {
				t.Errorf("etcd has %+v, %v; held %+v", is, err, held)
			}
			return
		}
	}
	t.Errorf("%s is not in etcd: %v", l.Key(), entries)
}

func TestHoldRenews(t *testing.T) {
	t.Parallel()
	r := open(t, share(t))
	c := claim(t, vxlanConfig, 1)
	c.TTL = 2 * time.Second
	l := acquire(t, r, c)
	lost := hold(t, r, l)
	eventually(t, "a renewal after the first lifetime", func() bool { held, _ := r.Held(); return held.Expires.After(l.Expires.Add(c.TTL)) })
	stands(t, r, l, lost)
	if held, _ := r.Held(); held.CreateRevision != l.CreateRevision || time.Until(held.Expires) <= 0 {
		t.Errorf("held %+v, at first %+v", held, l)
	}
}

// renew keeps nothing in memory for each renewal. This test is not parallel, so that
// no other allocates meanwhile.
func TestRenewalsKeepNoMemory(t *testing.T) {
	const first, last = 100, 10_100
	objects := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapObjects)
	}
	var before int64
	lease := &instantLease{each: func(n int) error {
		switch n {
		case first:
			before = objects()
		case last:
			// The runtime frees the stopped timers of requests late. A timer kept for each renewal
			// is five objects.
			eventually(t, "the memory of 10,000 renewals is freed", func() bool { return objects()-before < 2*(last-first) })
			return errUnanswered
		}
		return nil
	}}
	r := open(t, "127.0.0.1:1", func(o *Options) { o.RequestTimeout = 10 * time.Millisecond })
	lease.Lease, r.client.Lease = r.client.Lease, lease
	r.setHeld(subnet.Lease{Node: "node-1", ID: 7, Endpoints: []subnet.Endpoint{{Subnet: mustPrefix("10.5.7.0/24")}}})
	if err := r.renew(t.Context(), &renewal{}); !errors.Is(err, errUnanswered) {
		t.Fatal(err)
	}
}

func TestFailedRenewalsAreNoLoss(t *testing.T) {
	t.Parallel()
	r := open(t, share(t))
	broken := &brokenLease{Lease: r.client.Lease}
	broken.broken.Store(true)
	r.client.Lease = broken
	l := acquire(t, r, claim(t, vxlanConfig, 1))
	lost := hold(t, r, l)
	time.Sleep(time.Second)
	stands(t, r, l, lost)
	if n := broken.asked.Load(); n < 3 || n > 25 {
		t.Errorf("tried %d renewals in a second", n)
	}
	broken.broken.Store(false)
	if held, _ := r.Held(); held.ID != l.ID {
		t.Errorf("the lease ID is %x, want %x", held.ID, l.ID)
	}
}

func TestMissingLeaseIsRecreated(t *testing.T) {
	t.Parallel()
	endpoint := share(t)
	for name, vanish := range map[string]func(r *Registry, l subnet.Lease) error{
		"expired": func(r *Registry, l subnet.Lease) error {
			_, err := r.client.Revoke(t.Context(), clientv3.LeaseID(l.ID))
			return err
		},
		"deleted": func(r *Registry, l subnet.Lease) error { return r.ReleaseKey(t.Context(), l.Key(), subnet.AnyRevision) },
		"by flannel": func(r *Registry, l subnet.Lease) error {
			_, err := r.client.Put(t.Context(), r.subnetsDir()+l.Key(),
				`{"PublicIP":"192.0.2.1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}`)
			return err
		},
		"spoilt": func(r *Registry, l subnet.Lease) error {
			_, err := r.client.Put(t.Context(), r.subnetsDir()+l.Key(), "oops", clientv3.WithLease(clientv3.LeaseID(l.ID)))
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := open(t, endpoint, at(t, name))
			setConfig(t, r, vxlanConfig)
			if _, err := r.Config(t.Context()); err != nil {
				t.Fatal(err)
			}
			l := acquire(t, r, claim(t, vxlanConfig, 1))
			lost := hold(t, r, l)
			watch(t, r, l)
			time.Sleep(50 * time.Millisecond)
			if err := vanish(r, l); err != nil {
				t.Fatal(err)
			}
			want, _ := l.Value()
			eventually(t, "our value", func() bool {
				entries, _, err := r.Entries(t.Context(), false)
				return err == nil && len(entries) == 1 && string(entries[0].Value) == string(want)
			})
			eventually(t, "what is held", func() bool { held, _ := r.Held(); return held.ModRevision > l.ModRevision })
			stands(t, r, l, lost)
		})
	}
}

// Without a watch, renewals detect an expiry.
func TestExpiryIsDetectedWithoutWatch(t *testing.T) {
	t.Parallel()
	r := open(t, share(t))
	c := claim(t, vxlanConfig, 1)
	c.TTL = 2 * time.Second
	l := acquire(t, r, c)
	lost := hold(t, r, l)
	time.Sleep(50 * time.Millisecond)
	if _, err := r.client.Revoke(t.Context(), clientv3.LeaseID(l.ID)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the lease again", func() bool { held, _ := r.Held(); return held.ID != l.ID })
	stands(t, r, l, lost)
}

func TestLoss(t *testing.T) {
	t.Parallel()
	endpoint := share(t)
	const thief = `{"PublicIP":"192.0.2.9","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},"NodeID":"thief"}`
	for name, c := range map[string]struct{ key, value, says string }{
		"taken":               {"10.5.7.0-24", thief, `"thief"`},
		"taken by flannel":    {"10.5.7.0-24", thief[:len(thief)-len(`,"NodeID":"thief"}`)] + "}", "192.0.2.9"},
		"reserved":            {"10.5.7.0-24", `{"NodeID":"printers"}`, "reserved"},
		"overlapped":          {"10.5.6.0-23", thief, `"thief"`},
		"malformed, not ours": {"10.5.7.0-24", "oops", "malformed"},
		"overlapped, badly":   {"10.5.6.0-23", "oops", "10.5.6.0/23"},
	} {
		t.Run(name, func(t *testing.T) {
			r := open(t, endpoint, at(t, name))
			setConfig(t, r, vxlanConfig)
			if _, err := r.Config(t.Context()); err != nil {
				t.Fatal(err)
			}
			own := claim(t, vxlanConfig, 1)
			own.Previous = append(own.Previous, mustPrefix("10.5.7.0/24"))
			l := acquire(t, r, own)
			// The lease is deleted, and another node gets the subnet.
			_, err := r.client.Txn(t.Context()).Then(
				clientv3.OpDelete(r.subnetsDir()+l.Key(), clientv3.WithPrefix()),
				clientv3.OpPut(r.subnetsDir()+"other", "")).Commit()
			if err != nil {
				t.Fatal(err)
			}
			put(t, r, "subnets/"+c.key, c.value)
			select {
			case err := <-hold(t, r, l):
				if !errors.Is(err, subnet.ErrLost) || !contains(err, c.says) {
					t.Errorf("got %v, want %s", err, c.says)
				}
			case <-time.After(5 * time.Second):
				t.Fatal("Hold did not return")
			}
			if entries, _, _ := r.Entries(t.Context(), false); len(entries) != 2 {
				t.Errorf("etcd has %v", entries)
			}
			// Neither Update nor Release changes another node's lease.
			if _, err := r.Update(t.Context(), movedTo(l, "192.0.2.5")); !errors.Is(err, subnet.ErrLost) {
				t.Errorf("update: %v", err)
			}
			if err := r.Release(t.Context(), l); err != nil {
				t.Errorf("release: %v", err)
			}
			if entries, _, _ := r.Entries(t.Context(), false); len(entries) != 2 {
				t.Errorf("etcd has %v", entries)
			}
		})
	}
}

func TestReleaseEndsHold(t *testing.T) {
	t.Parallel()
	r := open(t, share(t))
	l := acquire(t, r, claim(t, vxlanConfig, 1))
	lost := hold(t, r, l)
	time.Sleep(50 * time.Millisecond)
	if err := r.Release(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-lost:
		if !errors.Is(err, subnet.ErrLost) {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("Hold did not return")
	}
}

func TestRestartOfEtcd(t *testing.T) {
	t.Parallel()
	server := etcdtest.StartServer(t, member.Options{})
	r := open(t, server.URL())
	setConfig(t, r, vxlanConfig)
	if _, err := r.Config(t.Context()); err != nil {
		t.Fatal(err)
	}
	l := acquire(t, r, claim(t, vxlanConfig, 1))
	acquire(t, open(t, server.URL()), claim(t, vxlanConfig, 2))
	lost := hold(t, r, l)
	w := watch(t, r, l)
	eventually(t, "the peer", func() bool { return len(w.last().Peers) == 1 })

	server.Stop()
	eventually(t, "the error", func() bool { _, errs := w.count(); return errs > 0 })
	before, _ := w.count()
	server.Start()
	eventually(t, "a fresh snapshot", func() bool { now, _ := w.count(); return now > before })
	if len(w.last().Peers) != 1 {
		t.Errorf("peers %v", w.last().Peers)
	}
	stands(t, r, l, lost)
	if held, _ := r.Held(); held.ID != l.ID || held.CreateRevision != l.CreateRevision {
		t.Errorf("held %+v, before %+v", held, l)
	}
}

// etcd is wiped while nodes run: every node recreates its lease, and no peer is
// dropped before that.
func TestWipedEtcd(t *testing.T) {
	t.Parallel()
	server := etcdtest.StartServer(t, member.Options{})
	var registries [3]*Registry
	var leases [3]subnet.Lease
	setConfig(t, open(t, server.URL()), vxlanConfig)
	for i := range registries {
		registries[i] = open(t, server.URL(), func(o *Options) { o.Settle = 3 * time.Second })
		if _, err := registries[i].Config(t.Context()); err != nil {
			t.Fatal(err)
		}
		leases[i] = acquire(t, registries[i], claim(t, vxlanConfig, i+1))
	}
	losts := [2]<-chan error{hold(t, registries[0], leases[0]), hold(t, registries[1], leases[1])}
	w := watch(t, registries[0], leases[0])
	watch(t, registries[1], leases[1])
	eventually(t, "two peers", func() bool { return len(w.last().Peers) == 2 })
	before, _ := w.count()

	server.Wipe()
	server.Start()
	for i := range losts {
		eventually(t, "the lease again", func() bool { held, _ := registries[i].Held(); return held.ID != leases[i].ID })
		stands(t, registries[i], leases[i], losts[i])
	}
	// The third node does not run: it remains a peer until the settle time is over.
	eventually(t, "the dead peer is removed", func() bool { return len(w.last().Peers) == 1 })
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, s := range w.snapshots[before:] {
		if len(s.Peers) != 2 && i != len(w.snapshots)-before-1 {
			t.Errorf("a snapshot in between with the peers %v", s.Peers)
		}
		if s.Config.Networks == nil || s.ConfigRefused == "" {
			t.Errorf("configuration %+v, refused %q", s.Config, s.ConfigRefused)
		}
	}
}
