package etcd

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"culvert/subnet"
	"culvert/subnet/etcd/etcdtest"
	"culvert/subnet/etcd/member"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// ready returns a registry with a configuration, a lease and a running watch.
func ready(t *testing.T, endpoint string, change ...func(*Options)) (*Registry, subnet.Lease, *watching) {
	t.Helper()
	r := open(t, endpoint, change...)
	setConfig(t, r, vxlanConfig)
	if _, err := r.Config(t.Context()); err != nil {
		t.Fatal(err)
	}
	l := acquire(t, r, claim(t, vxlanConfig, 1))
	w := watch(t, r, l)
	eventually(t, "the first snapshot", func() bool { n, _ := w.count(); return n > 0 })
	return r, l, w
}

func peerValue(n int) string {
	return fmt.Sprintf(`{"PublicIP":"198.51.100.%d","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"%s"}}`,
		n, subnet.DeriveMAC(fmt.Sprint(n), 1, false))
}

func TestMalformedLeasesAreLoggedOnce(t *testing.T) {
	t.Parallel()
	log := &lines{}
	r, l, w := ready(t, share(t), log.options)
	_ = l
	put(t, r, "subnets/10.5.1.0-24", peerValue(1))
	put(t, r, "subnets/10.5.2.0-24", "oops")
	put(t, r, "subnets/10.5.3.0-24", strings.Repeat("x", subnet.MaxValueLen+1))
	put(t, r, "subnets/0.0.0.0-0", peerValue(4))
	for n := 5; n < 10; n++ { // more snapshots with the same faults
		put(t, r, fmt.Sprintf("subnets/10.5.%d.0-24", n), peerValue(n))
	}
	eventually(t, "all", func() bool { s := w.last(); return len(s.Peers) == 6 && len(s.Rejected) == 3 })
	for _, key := range []string{"10.5.2.0-24", "10.5.3.0-24", "0.0.0.0-0"} {
		if n := log.count("subnet=" + key); n != 1 {
			t.Errorf("%s is in the log %d times", key, n)
		}
	}
	// A value that becomes malformed removes only its own peer. Each new malformed
	// value is logged again.
	put(t, r, "subnets/10.5.1.0-24", "oops")
	put(t, r, "subnets/10.5.2.0-24", "oops again")
	eventually(t, "both", func() bool { s := w.last(); return len(s.Peers) == 5 && len(s.Rejected) == 4 })
	eventually(t, "the log", func() bool { return log.count("subnet=10.5.2.0-24") == 2 && log.count("subnet=10.5.1.0-24") == 1 })
	if _, errs := w.count(); errs != 0 {
		t.Errorf("%d errors", errs)
	}
}

// Changes that happen while disconnected and are compacted away are in the next
// snapshot. Until then the last one remains valid.
func TestCompactionWhileDisconnected(t *testing.T) {
	t.Parallel()
	server := etcdtest.StartServer(t, member.Options{})
	_, _, w := ready(t, server.URL())
	direct := open(t, server.Direct())
	put(t, direct, "subnets/10.5.1.0-24", peerValue(1))
	put(t, direct, "subnets/10.5.2.0-24", peerValue(2))
	eventually(t, "two peers", func() bool { return len(w.last().Peers) == 2 })
	before, _ := w.count()

	server.Cut()
	if err := direct.ReleaseKey(t.Context(), "10.5.1.0-24", subnet.AnyRevision); err != nil {
		t.Fatal(err)
	}
	put(t, direct, "subnets/10.5.3.0-24", peerValue(3))
	_, revision, err := direct.Entries(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	put(t, direct, "subnets/10.5.4.0-24", peerValue(4))
	if _, err := direct.client.Compact(t.Context(), revision+1); err != nil {
		t.Fatal(err)
	}
	server.Mend()
	eventually(t, "the changes", func() bool { return len(w.last().Peers) == 3 && w.last().Peers[2].Key() == "10.5.4.0-24" })
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.snapshots[before:] {
		if len(s.Peers) != 3 {
			t.Errorf("a snapshot in between with %v", s.Peers)
		}
	}
}

// A connection that delivers nothing is detected by keepalive pings after 15 s and
// replaced.
func TestBlackHole(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes 20 s")
	}
	server := etcdtest.StartServer(t, member.Options{})
	r, l, w := ready(t, server.URL())
	lost := hold(t, r, l)
	direct := open(t, server.Direct())
	server.Freeze()
	began := time.Now()
	put(t, direct, "subnets/10.5.1.0-24", peerValue(1))
	within(t, 25*time.Second, "the error", func() bool { _, errs := w.count(); return errs > 0 })
	noticed := time.Since(began)
	server.Mend()
	within(t, 15*time.Second, "the peer", func() bool { return len(w.last().Peers) == 1 })
	t.Logf("detected after %v, up to date %v after Mend", noticed.Round(time.Millisecond), (time.Since(began) - noticed).Round(time.Millisecond))
	stands(t, r, l, lost)
}

// When etcd ends a watch, the leases are listed again: silently after a compaction,
// with an error if there is no leader.
func TestEndedWatches(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		resp clientv3.WatchResponse
		errs int
	}{
		"compacted": {clientv3.WatchResponse{Canceled: true, CompactRevision: 99}, 0},
		"no leader": {clientv3.WatchResponse{Canceled: true}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			endpoint := share(t)
			r := open(t, endpoint)
			watcher := &faultyWatcher{Watcher: r.client.Watcher, inject: make(chan clientv3.WatchResponse)}
			r.client.Watcher = watcher
			setConfig(t, r, vxlanConfig)
			if _, err := r.Config(t.Context()); err != nil {
				t.Fatal(err)
			}
			l := acquire(t, r, claim(t, vxlanConfig, 1))
			w := watch(t, r, l)
			eventually(t, "the first snapshot", func() bool { n, _ := w.count(); return n > 0 })
			before, _ := w.count()
			watcher.inject <- c.resp
			eventually(t, "a fresh snapshot", func() bool { n, errs := w.count(); return n > before && errs == c.errs })
			put(t, r, "subnets/10.5.1.0-24", peerValue(1))
			eventually(t, "the next change", func() bool { return len(w.last().Peers) == 1 })
		})
	}
}

// A slow consumer gets the latest snapshot, not every one.
func TestSlowConsumer(t *testing.T) {
	t.Parallel()
	endpoint := share(t)
	r, l, _ := ready(t, endpoint)
	n := 0
	for s, err := range r.Watch(t.Context(), l) {
		if err != nil {
			t.Fatal(err)
		}
		n++
		if len(s.Peers)+len(s.Rejected) == 200 { // one of them overlaps ours
			break
		}
		if n == 1 {
			for i := range 200 {
				put(t, r, fmt.Sprintf("subnets/10.5.%d.0-28", i), peerValue(i))
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
	if n > 4 {
		t.Errorf("%d snapshots, want at most 4", n)
	}
}

func TestConfigWaits(t *testing.T) {
	t.Parallel()
	log := &lines{}
	endpoint := share(t)
	r, admin := open(t, endpoint, log.options), open(t, endpoint)
	got := make(chan subnet.Config, 1)
	go func() {
		cfg, err := r.Config(t.Context())
		if err != nil {
			t.Error(err)
		}
		got <- cfg
	}()
	eventually(t, "the reminder", func() bool { return log.count("culvert config set") == 1 })
	put(t, admin, "config", `{"Network":"10.5.0.0/31"}`)
	time.Sleep(200 * time.Millisecond)
	put(t, admin, "config", `{"Network":"10.5.0.0/16","SubnetLne":24}`)
	cfg := <-got
	if cfg.Networks[0].Prefix.String() != "10.5.0.0/16" {
		t.Errorf("%+v", cfg)
	}
	if n := log.count("culvert config set"); n != 1 {
		t.Errorf("logged %d times within a minute how to set it", n)
	}
	if log.count("SubnetLne") != 1 || log.count(`did you mean \"SubnetLen\"`) != 1 {
		t.Errorf("no warning in %s", log)
	}
}

func TestConfigChanges(t *testing.T) {
	t.Parallel()
	r, l, w := ready(t, share(t))
	for _, step := range []struct{ text, network, refused string }{
		{`{"Network":"10.4.0.0/15"}`, "10.4.0.0/15", ""},
		{`{"Network":"10.5.0.0/31"}`, "10.4.0.0/15", "too small"},
		{`oops`, "10.4.0.0/15", "not JSON"},
		{`{"Network":"10.99.0.0/16"}`, "10.4.0.0/15", "outside"},
		{`{"Network":"10.4.0.0/15","Backend":{"Type":"ipip"}}`, "10.4.0.0/15", "backend"},
		{"", "10.4.0.0/15", "missing"},
		{vxlanConfig, "10.5.0.0/16", ""},
	} {
		if step.text == "" {
			if _, err := r.client.Delete(t.Context(), r.configKey()); err != nil {
				t.Fatal(err)
			}
		} else {
			put(t, r, "config", step.text)
		}
		eventually(t, step.text, func() bool {
			s := w.last()
			return s.Config.Networks[0].Prefix.String() == step.network && strings.Contains(s.ConfigRefused, step.refused) &&
				(step.refused == "") == (s.ConfigRefused == "")
		})
		if w.last().Self.Key() != l.Key() {
			t.Errorf("self is %v", w.last().Self)
		}
	}
}

func TestPermanentErrors(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]bool{
		rpctypes.ErrAuthFailed: true, rpctypes.ErrPermissionDenied: true, rpctypes.ErrUserEmpty: true,
		rpctypes.ErrInvalidAuthToken: false, rpctypes.ErrNoLeader: false, rpctypes.ErrLeaseNotFound: false,
		rpctypes.ErrTimeout: false, rpctypes.ErrNoSpace: false, errRace: false, errUnanswered: false,
		subnet.ErrConflict: true, subnet.ErrExhausted: true, subnet.ErrLost: true, rpctypes.ErrAuthOldRevision: false,
	} {
		if got := permanent(fmt.Errorf("wrapped: %w", err)); got != want {
			t.Errorf("permanent(%v) is %v", err, got)
		}
	}
}
