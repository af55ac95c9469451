package daemon

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"culvert/backend"
	"culvert/internal/api"
	"culvert/internal/api/readiness"
	"culvert/internal/host"
	"culvert/subnet"
	"culvert/subnet/etcd"
	"culvert/subnet/kube"
)

// TestReadiness checks the answer to the CNI plugin and /readyz in each state of the
// node: whether pods can be added, and if not, the reason and the plugin's error code.
func TestReadiness(t *testing.T) {
	now := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	lease := func(s *api.Status, expires time.Time) {
		s.Lease = &api.Lease{Subnets: []netip.Prefix{netip.MustParsePrefix("10.5.1.0/24")}, Expires: expires}
	}
	for _, c := range []struct {
		name string
		set  func(*state)
		code readiness.Code // empty: ready
		says string
	}{
		{"just started", func(*state) {}, readiness.NoLease, "this node has no lease yet: starting"},
		{"waiting", func(st *state) { st.notReady("waiting for the network configuration") }, readiness.NoLease, "waiting for the network configuration"},
		{"leased, no datapath", func(st *state) {
			st.change(func(s *api.Status) { lease(s, now.Add(time.Hour)) })
			st.notReady("no TUN device")
		}, readiness.DatapathDown, "no TUN device"},
		{"ready", func(st *state) {
			st.change(func(s *api.Status) { lease(s, now.Add(time.Hour)) })
			st.ready()
		}, "", ""},
		{"a lease that never ends", func(st *state) {
			st.change(func(s *api.Status) { lease(s, time.Time{}) })
			st.ready()
		}, "", ""},
		{"etcd is unreachable, the lease is valid", func(st *state) {
			st.change(func(s *api.Status) { lease(s, now.Add(time.Second)) })
			st.ready()
			st.storeLost(errors.New("connection refused"))
		}, "", ""},
		{"etcd is unreachable, the lease has ended", func(st *state) {
			st.change(func(s *api.Status) { lease(s, now.Add(-time.Second)) })
			st.ready()
			st.storeLost(errors.New("connection refused"))
		}, readiness.Fenced, "expired at 2026-11-29T11:59:59Z (etcd is unreachable: connection refused)"},
		{"the lease was not renewed", func(st *state) {
			st.change(func(s *api.Status) { lease(s, now.Add(-time.Second)) })
			st.ready()
		}, readiness.Fenced, "it was not renewed"},
		{"the Node is gone", func(st *state) {
			st.change(func(s *api.Status) { lease(s, now.Add(-time.Second)); s.Store.Kind = "kubernetes" })
			st.ready()
		}, readiness.Fenced, "there is no Node n1 with these podCIDRs"},
		{"fenced", func(st *state) {
			st.setFenced(&api.Fenced{Subnets: []netip.Prefix{netip.MustParsePrefix("10.5.1.0/24")}, Reason: "n2 holds it", Pods: 2})
		}, readiness.Fenced, "n2 holds it; 2 pods of it are left: delete them, or start the daemon with --on-lost=release"},
		{"no longer fenced", func(st *state) {
			st.setFenced(&api.Fenced{Reason: "n2 holds it"})
			st.setFenced(nil)
		}, readiness.NoLease, "no longer fenced"},
	} {
		st := newState(Options{Node: "n1", Etcd: etcd.Options{}})
		c.set(st)
		a := st.readiness(now)
		if a.Ready != (c.code == "") || a.Code != c.code || !strings.Contains(a.Reason, c.says) {
			t.Errorf("%s: %+v", c.name, a)
		}
	}
}

// standing is a datapath that only has a status.
type standing struct{ api.Datapath }

func (standing) Apply(context.Context, subnet.Snapshot) error { return nil }
func (standing) Run(context.Context) error                    { return nil }
func (s standing) Status() api.Datapath {
	s.Repairs = maps.Clone(s.Repairs) // the caller owns the status
	return s.Datapath
}
func (standing) Look(context.Context)          {}
func (standing) Peers() ([]api.PeerState, int) { return nil, 0 }
func (standing) Close(how backend.How) error   { return nil }

// TestStatusCountsRepairsOfEarlierDatapaths checks that the count of repairs never goes
// back when the datapath is reopened.
func TestStatusCountsRepairsOfEarlierDatapaths(t *testing.T) {
	st := newState(Options{})
	st.setDatapath(standing{api.Datapath{Kind: "kernel", Repairs: map[string]uint64{"route": 3, "sysctl": 1}}})
	st.setDatapath(standing{api.Datapath{Kind: "userspace", Repairs: map[string]uint64{"route": 2}}})
	st.repaired("route", 10)
	for range 2 { // reading it changes nothing
		if s := st.status(); !reflect.DeepEqual(s.Datapath.Repairs, map[string]uint64{"route": 15, "sysctl": 1}) || s.Datapath.Kind != "userspace" {
			t.Errorf("%+v", s.Datapath)
		}
	}
}

// TestStatusGathersWarnings checks that the warnings of all parts are shown, each part
// replacing its own.
func TestStatusGathersWarnings(t *testing.T) {
	st := newState(Options{})
	warn := func(check string) api.Warning { return api.Warning{Check: check, Text: "x"} }
	st.setDatapath(standing{api.Datapath{Warnings: []api.Warning{warn("silent-peer")}}})
	st.setWarnings("cni", warn("cni-conf"), warn("subnet-file"))
	st.setWarnings("usage", warn("network-nearly-full"))
	st.setWarnings("cni", warn("subnet-file"))
	var got []string
	for _, w := range st.status().Warnings {
		got = append(got, w.Check)
	}
	if want := []string{"network-nearly-full", "silent-peer", "subnet-file"}; !reflect.DeepEqual(got, want) {
		t.Error(got)
	}
}

// TestNearlyFull checks that a network that fills up is logged at 80 % and every 5 %
// more, that the warning stays in the status, and that it ends.
func TestNearlyFull(t *testing.T) {
	st := newState(Options{})
	var log bytes.Buffer
	network := netip.MustParsePrefix("10.5.0.0/16")
	for _, c := range []struct {
		used           int64
		logged, warned bool
	}{
		{70, false, false},
		{80, true, true},
		{80, false, true},
		{84, false, true},
		{86, true, true},
		{79, false, false},
		{81, true, true}, // again, after it had room
	} {
		log.Reset()
		st.setUsage([]subnet.Usage{{Network: network, Used: c.used, Capacity: 100}}, slog.New(slog.NewTextHandler(&log, nil)))
		s := st.status()
		if logged := log.Len() > 0; logged != c.logged || (len(s.Warnings) > 0) != c.warned || len(s.Usage) != 1 || s.Usage[0].Used != c.used {
			t.Errorf("%d of 100 in use: logged %t, warnings %v, usage %v", c.used, logged, s.Warnings, s.Usage)
		}
	}
}

// TestSnapshotSetsTheStore checks what the status says of the store: after a snapshot
// from the store, from disk, and after an error.
func TestSnapshotSetsTheStore(t *testing.T) {
	st, log := newState(Options{}), slog.New(slog.DiscardHandler)
	st.setSnapshot(subnet.Snapshot{Revision: 5, Kept: time.Unix(100, 0), Rejected: []subnet.Rejection{{Key: "k", Reason: "bad"}}}, log)
	s := st.status()
	if s.Store.Connected || s.Store.Error != "it was unreachable when this daemon started" || s.Store.Snapshot.Unix() != 100 || len(s.Rejected) != 1 {
		t.Errorf("from disk: %+v %v", s.Store, s.Rejected)
	}
	st.setSnapshot(subnet.Snapshot{Revision: 6}, log)
	s = st.status()
	since := s.Store.Since
	if !s.Store.Connected || s.Store.Error != "" || !s.Store.Snapshot.IsZero() || s.Store.Revision != 6 || len(s.Rejected) != 0 || since.IsZero() {
		t.Errorf("from the store: %+v", s.Store)
	}
	st.setSnapshot(subnet.Snapshot{Revision: 7}, log)
	if s := st.status(); s.Store.Since != since {
		t.Error("the time of the connection changed")
	}
	st.storeLost(errors.New("refused"))
	if s := st.status(); s.Store.Connected || s.Store.Error != "refused" || s.Store.Revision != 7 {
		t.Errorf("lost: %+v", s.Store)
	}
}

// TestSavedOptions checks that what a daemon saves for `culvert doctor` is read back, and
// that no secret is in it.
func TestSavedOptions(t *testing.T) {
	for _, o := range []Options{
		{
			Version: "v1", Node: "n1", SubnetFile: "/run/flannel/subnet.env", IPMasq: true, Datapath: Kernel, FastPath: "auto", Metrics: "127.0.0.1:9472",
			Etcd:      etcd.Options{Endpoints: []string{"https://192.0.2.1:2379"}, Prefix: "/coreos.com/network", User: "me", Password: "s3cret"},
			Underlay:  host.UnderlaySelector{Interfaces: []string{"eth1"}, CanReach: netip.MustParseAddr("192.0.2.9"), PublicIPs: []netip.Addr{netip.MustParseAddr("198.51.100.1")}},
			PublicIPs: []netip.Addr{netip.MustParseAddr("198.51.100.1")}, NoMasq: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12")}, TakeOverFlannel: true,
		},
		{Version: "v1", Node: "n2", Kubernetes: &kube.Options{Server: "https://192.0.2.1:6443", Prefix: "flannel.alpha.coreos.com", NetConf: "/etc/net-conf.json"}},
	} {
		o.RunDir = t.TempDir()
		if none, err := LoadOptions(o.RunDir); none != nil || err != nil {
			t.Errorf("before it is saved: %v, %v", none, err)
		}
		if err := o.save(); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(savedOptionsPath(o.RunDir))
		if err != nil || bytes.Contains(text, []byte("s3cret")) {
			t.Errorf("%v: %s", err, text)
		}
		saved, err := LoadOptions(o.RunDir)
		if err != nil {
			t.Fatal(err)
		}
		got := saved.options(o.RunDir)
		if got.Node != o.Node || got.IPMasq != o.IPMasq || got.Datapath != o.Datapath || got.TakeOverFlannel != o.TakeOverFlannel || got.Metrics != o.Metrics ||
			!reflect.DeepEqual(got.Underlay, o.Underlay) || !reflect.DeepEqual(got.NoMasq, o.NoMasq) || got.describeStore().Kind != o.describeStore().Kind ||
			!reflect.DeepEqual(got.servers().URLs, o.servers().URLs) {
			t.Errorf("read back: %+v", got)
		}
		if err := os.WriteFile(savedOptionsPath(o.RunDir), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadOptions(o.RunDir); err == nil || !strings.Contains(err.Error(), savedOptionsPath(o.RunDir)) {
			t.Errorf("a damaged file: %v", err)
		}
	}
}
