package etcd

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"culvert/subnet"
	"culvert/subnet/etcd/etcdtest"
	"culvert/subnet/etcd/member"
	"culvert/subnet/kept"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// withFiles sets the files that the daemon uses.
func withFiles(dir string) func(*Options) {
	return func(o *Options) {
		o.StateFile, o.SnapshotFile = filepath.Join(dir, "lease.json"), filepath.Join(dir, "snapshot.json")
	}
}

// onDisk returns the saved state, which must exist and be valid.
func onDisk(t *testing.T, r *Registry) *kept.State {
	t.Helper()
	k, err := r.Kept("node-1")
	if err != nil || k == nil {
		t.Fatalf("kept %v, %v", k, err)
	}
	return k
}

// A registry opened while etcd is unreachable starts from the saved state, with the
// saved expiry. It then applies the first list like any change; a wiped store
// removes no peer.
func TestResume(t *testing.T) {
	t.Parallel()
	for name, wipe := range map[string]bool{"the same etcd": false, "wiped": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := etcdtest.StartServer(t, member.Options{})
			files := withFiles(t.TempDir())
			before := open(t, server.URL(), files)
			setConfig(t, before, vxlanConfig)
			put(t, before, "subnets/10.5.250.0-24", peerValue(1))
			put(t, before, "subnets/10.5.251.0-24", peerValue(2))
			put(t, before, "subnets/10.5.252.0-24", "malformed")
			l := acquire(t, before, claim(t, vxlanConfig, 1))
			first := watch(t, before, l)
			eventually(t, "the first snapshot is saved", func() bool { k, err := before.Kept("node-1"); return k != nil && err == nil })
			put(t, before, "subnets/10.5.251.0-24", peerValue(3))
			eventually(t, "a change", func() bool {
				s := first.last()
				return len(s.Peers) == 2 && s.Peers[1].Publics()[0].String() == "198.51.100.3"
			})
			first.stop() // before the next periodic write
			held, _ := before.Held()
			if err := before.Answers(t.Context()); err != nil {
				t.Errorf("etcd is reported unreachable: %v", err)
			}

			server.Stop()
			r := open(t, server.URL(), files, func(o *Options) { o.Settle = time.Minute })
			began := time.Now()
			if err := r.Answers(t.Context()); err == nil || time.Since(began) > time.Second {
				t.Errorf("unreachable etcd: got %v after %v", err, time.Since(began))
			}
			k := onDisk(t, r)
			if late := k.Lease.Expires.Sub(held.Expires); k.Lease.Key() != l.Key() || k.Lease.ID != l.ID || late > 0 || late < -time.Second {
				t.Errorf("kept %+v of %+v, %v late", k.Lease, held, late)
			}
			r.Resume(k, time.Minute)
			w := watch(t, r, k.Lease)
			lost := hold(t, r, k.Lease)
			eventually(t, "the kept snapshot", func() bool { s := w.last(); return len(s.Peers) == 2 })
			if s := w.last(); s.Kept.IsZero() || !s.Self.Expires.Equal(k.Lease.Expires) || s.Peers[1].Publics()[0].String() != "198.51.100.3" {
				t.Errorf("snapshot %+v", s)
			}

			if wipe {
				server.Wipe()
			}
			server.Start()
			if !wipe {
				put(t, open(t, server.URL()), "subnets/10.5.250.0-24", peerValue(4))
			} else {
				setConfig(t, open(t, server.URL()), vxlanConfig)
			}
			eventually(t, "a snapshot of etcd", func() bool { s := w.last(); return s.Kept.IsZero() && s.Revision > 0 })
			eventually(t, "our lease", func() bool { h, _ := r.Held(); return h.Expires.After(k.Lease.Expires) })
			stands(t, r, l, lost)
			if !wipe {
				eventually(t, "what has changed", func() bool {
					return len(w.last().Peers) == 2 && w.last().Peers[0].Publics()[0].String() == "198.51.100.4"
				})
			} else if n := len(w.last().Peers); n != 2 {
				t.Errorf("%d peers are left", n)
			}
		})
	}
}

// The saved state is deleted as soon as another node may have the subnet.
func TestSavedStateIsDeleted(t *testing.T) {
	t.Parallel()
	endpoint := share(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "snapshot.json")
	gone := func(when string) {
		t.Helper()
		if _, err := os.Stat(file); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", when, err)
		}
	}
	there := func() bool { _, err := os.Stat(file); return err == nil }
	r := open(t, endpoint, withFiles(dir))
	setConfig(t, r, vxlanConfig)
	c := claim(t, vxlanConfig, 1)

	l := acquire(t, r, c)
	w := watch(t, r, l)
	eventually(t, "it is saved", there)
	if err := r.Release(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	w.stop()
	gone("after a release")

	l = acquire(t, r, c)
	w = watch(t, r, l)
	lost := hold(t, r, l)
	eventually(t, "it is saved again", there)
	put(t, r, "subnets/"+l.Key(), peerValue(9))
	if err := <-lost; !errors.Is(err, subnet.ErrLost) {
		t.Fatal(err)
	}
	w.stop()
	gone("after a loss")

	// A claim that gives up the saved subnet deletes the file before it writes, so
	// that a lost response does not matter.
	r = open(t, endpoint, withFiles(dir))
	l = acquire(t, r, c)
	w = watch(t, r, l)
	eventually(t, "it is saved once more", there)
	w.stop()
	c.Config.Networks = append(c.Config.Networks[:0:0], c.Config.Networks...)
	c.Config.Networks[0].SubnetLen = 25
	r = open(t, endpoint, withFiles(dir))
	kv := &forgetfulKV{KV: r.client.KV, gone: func() { gone("when another subnet is written") }}
	r.client.KV = kv
	if l = acquire(t, r, c); l.Subnets()[0].Bits() != 25 || !kv.wrote {
		t.Errorf("acquired %s", l)
	}
	gone("after a claim of another subnet")
}

// forgetfulKV calls gone before each write.
type forgetfulKV struct {
	clientv3.KV
	gone  func()
	wrote bool
}

func (kv *forgetfulKV) Txn(ctx context.Context) clientv3.Txn {
	return &forgetfulTxn{kv.KV.Txn(ctx), kv}
}

type forgetfulTxn struct {
	clientv3.Txn
	kv *forgetfulKV
}

func (t *forgetfulTxn) If(ifs ...clientv3.Cmp) clientv3.Txn { t.Txn = t.Txn.If(ifs...); return t }

func (t *forgetfulTxn) Then(ops ...clientv3.Op) clientv3.Txn {
	if writes(ops) {
		t.kv.wrote = true
		t.kv.gone()
	}
	t.Txn = t.Txn.Then(ops...)
	return t
}

// State of another node, network, etcd or lease is rejected with the reason.
func TestKeptIsOurs(t *testing.T) {
	t.Parallel()
	cfg, _, err := subnet.ParseConfig([]byte(vxlanConfig))
	if err != nil {
		t.Fatal(err)
	}
	own := subnet.NewEntry(subnet.Entry{
		Key: "10.5.7.0-24", CreateRevision: 3, ModRevision: 4, ID: 5,
		Value: []byte(`{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"},"NodeID":"node-1"}`),
	})
	lease, err := own.Lease()
	if err != nil {
		t.Fatal(err)
	}
	lease.Expires = time.Now().Add(time.Hour)
	dir := t.TempDir()
	good := kept.State{
		Node: "node-1", Prefix: DefaultPrefix, Endpoints: []string{"http://192.0.2.9:2379"}, Config: cfg, Lease: lease,
		Cluster: 7, Revision: 9, Entries: []subnet.Entry{own},
	}
	for name, c := range map[string]struct {
		change func(*kept.State, *Options)
		node   string
		fault  string
	}{
		"ours":            {func(*kept.State, *Options) {}, "node-1", ""},
		"another node":    {func(*kept.State, *Options) {}, "node-2", `belongs to the node "node-1"`},
		"another prefix":  {func(_ *kept.State, o *Options) { o.Prefix = "/elsewhere" }, "node-1", "the network at"},
		"another etcd":    {func(s *kept.State, _ *Options) { s.Endpoints = []string{"http://192.0.2.10:2379"} }, "node-1", "another etcd"},
		"another lease":   {func(_ *kept.State, o *Options) { o.StateFile = filepath.Join(dir, "absent") }, "node-1", "acquired another lease"},
		"run out":         {func(s *kept.State, _ *Options) { s.Lease.Expires = time.Now().Add(-time.Second) }, "node-1", "may have expired"},
		"another's lease": {func(s *kept.State, _ *Options) { s.Lease.Node = "node-3" }, "node-1", "does not belong"},
	} {
		state, o := good, Options{Prefix: DefaultPrefix, Endpoints: good.Endpoints, SnapshotFile: filepath.Join(dir, "snapshot.json")}
		c.change(&state, &o)
		r := &Registry{opts: o, copy: kept.NewCopy(o.SnapshotFile, slog.New(slog.DiscardHandler))}
		if err := r.copy.Write(state); err != nil {
			t.Fatal(err)
		}
		k, err := r.Kept(c.node)
		if c.fault == "" && (err != nil || k == nil) || c.fault != "" && (!contains(err, c.fault) || k != nil) {
			t.Errorf("%s: %v, %v", name, k, err)
		}
	}
	read := func(file string) (*kept.State, error) {
		return (&Registry{copy: kept.NewCopy(file, slog.New(slog.DiscardHandler))}).Kept("node-1")
	}
	if _, err := read(dir); err == nil {
		t.Error("accepted a directory")
	}
	if k, err := read(filepath.Join(dir, "absent.json")); k != nil || err != nil {
		t.Errorf("without a file: %v, %v", k, err)
	}
}
