package etcd

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"culvert/subnet"

	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestUnansweredCommits(t *testing.T) {
	t.Parallel()
	endpoint := share(t)
	for name, delayed := range map[string]bool{"committed": false, "late": true} {
		t.Run(name, func(t *testing.T) {
			r := open(t, endpoint, at(t, name))
			kv := &lossyKV{KV: r.client.KV, delayed: delayed}
			kv.lose.Store(3)
			r.client.KV = kv
			l := acquire(t, r, claim(t, vxlanConfig, 1))
			kv.deliver() // the delayed requests arrive
			entries, _, err := r.Entries(t.Context(), false)
			if err != nil || len(entries) != 1 || entries[0].Key != l.Key() || entries[0].ID != l.ID {
				t.Errorf("hold %s with %x; etcd has %v, %v", l, l.ID, entries, err)
			}
			ends, _, err := r.timeToLive(t.Context(), l.ID)
			if err != nil || ends.IsZero() {
				t.Errorf("the lease ends at %v, %v", ends, err)
			}
		})
	}
}

func TestLostRaceTakesAnother(t *testing.T) {
	t.Parallel()
	endpoint := share(t)
	r, thief := open(t, endpoint), open(t, endpoint)
	first, err := subnet.Choose(claim(t, vxlanConfig, 1), subnet.Occupancy{})
	if err != nil {
		t.Fatal(err)
	}
	kv := &racingKV{KV: r.client.KV, before: func() {
		c := claim(t, vxlanConfig, 2)
		c.Previous = first.Lease.Subnets()
		if l := acquire(t, thief, c); l.Key() != first.Lease.Key() {
			t.Errorf("the other took %s", l)
		}
	}}
	r.client.KV = kv
	if l := acquire(t, r, claim(t, vxlanConfig, 1)); l.Key() == first.Lease.Key() {
		t.Errorf("both have %s", l.Key())
	}
}

// racingKV calls before between the first list and the first write.
type racingKV struct {
	clientv3.KV
	once   sync.Once
	before func()
}

func (kv *racingKV) Txn(ctx context.Context) clientv3.Txn {
	return &racingTxn{kv.KV.Txn(ctx), kv}
}

type racingTxn struct {
	clientv3.Txn
	kv *racingKV
}

func (t *racingTxn) If(ifs ...clientv3.Cmp) clientv3.Txn {
	t.kv.once.Do(t.kv.before)
	return t.Txn.If(ifs...)
}

func TestConflicts(t *testing.T) {
	t.Parallel()
	endpoint := share(t)
	r := open(t, endpoint)
	l := acquire(t, r, claim(t, vxlanConfig, 1))
	t.Run("one address, two identities", func(t *testing.T) {
		c := claim(t, vxlanConfig, 1)
		c.Node = "other"
		_, err := open(t, endpoint).Acquire(t.Context(), c)
		expectConflict(t, err, `"other"`, `"node-1"`, "192.0.2.1", l.Subnets()[0].String())
	})
	t.Run("one identity, two addresses", func(t *testing.T) {
		c := claim(t, vxlanConfig, 2)
		c.Node = "node-1"
		_, err := open(t, endpoint).Acquire(t.Context(), c)
		expectConflict(t, err, `"node-1"`, "192.0.2.1", "192.0.2.2")
	})
	// Ten nodes with the same identity start at once, so that none is in another's
	// list.
	t.Run("clones racing", func(t *testing.T) {
		var racing sync.WaitGroup
		start := make(chan struct{})
		errs := make([]error, 10)
		for i := range errs {
			clone := open(t, endpoint, at(t, "clones"))
			c := claim(t, vxlanConfig, i+1)
			c.Node = "clone"
			c.Previous = []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 5, byte(i + 1), 0}), 24)}
			racing.Go(func() {
				<-start
				_, errs[i] = clone.Acquire(t.Context(), c)
			})
		}
		close(start)
		racing.Wait()
		won := 0
		for _, err := range errs {
			if err == nil {
				won++
			} else {
				expectConflict(t, err, `"clone"`)
			}
		}
		entries, _, err := open(t, endpoint, at(t, "clones")).Entries(t.Context(), false)
		if won != 1 || err != nil || len(entries) != 1 {
			t.Errorf("%d clones have a lease; etcd has %d, %v", won, len(entries), err)
		}
	})
}

func expectConflict(t *testing.T, err error, names ...string) {
	t.Helper()
	if !errors.Is(err, subnet.ErrConflict) {
		t.Fatalf("got %v", err)
	}
	for _, name := range names {
		if !strings.Contains(err.Error(), name) {
			t.Errorf("%q does not name %s", err, name)
		}
	}
}

func TestExhaustion(t *testing.T) {
	t.Parallel()
	endpoint := share(t)
	const config = `{"Network":"10.5.0.0/26","SubnetLen":28,"SubnetMin":"10.5.0.0"}`
	r := open(t, endpoint)
	if _, err := r.Reserve(t.Context(), "printers", []netip.Prefix{netip.MustParsePrefix("10.5.0.16/28")}); err != nil {
		t.Fatal(err)
	}
	put(t, r, "subnets/10.5.0.32-28", "oops")
	for n := 1; n <= 2; n++ {
		acquire(t, open(t, endpoint), claim(t, config, n))
	}
	began := time.Now()
	_, err := r.Acquire(t.Context(), claim(t, config, 3))
	if !errors.Is(err, subnet.ErrExhausted) || !strings.Contains(err.Error(), "the 4 subnets of /28") || time.Since(began) > time.Second {
		t.Errorf("%v after %v", err, time.Since(began))
	}
}

// A host migrates from flannel: its lease is recognized by the address, keeps the
// subnet and gains an identity. A lease that never expires still does not.
func TestTakingOverFromFlannel(t *testing.T) {
	t.Parallel()
	endpoint := share(t)
	const value = `{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}`
	for name, forever := range map[string]bool{"leased": false, "for ever": true} {
		t.Run(name, func(t *testing.T) {
			r := open(t, endpoint, at(t, name))
			var opts []clientv3.OpOption
			if !forever {
				g, err := r.client.Grant(t.Context(), 86400)
				if err != nil {
					t.Fatal(err)
				}
				opts = append(opts, clientv3.WithLease(g.ID))
			}
			if _, err := r.client.Put(t.Context(), r.subnetsDir()+"10.5.77.0-24", value, opts...); err != nil {
				t.Fatal(err)
			}
			l := acquire(t, r, claim(t, vxlanConfig, 1))
			if l.Key() != "10.5.77.0-24" || (l.ID == 0) != forever {
				t.Fatalf("has %s, handle %x", l, l.ID)
			}
			lost := hold(t, r, l)
			time.Sleep(50 * time.Millisecond)
			entries, _, err := r.Entries(t.Context(), false)
			if err != nil || len(entries) != 1 || (entries[0].ID == 0) != forever ||
				!strings.HasSuffix(string(entries[0].Value), `,"NodeID":"node-1"}`) || !strings.HasPrefix(string(entries[0].Value), value[:80]) {
				t.Errorf("etcd has %s, %v", entries[0].Value, err)
			}
			if len(lost) > 0 {
				t.Error(<-lost)
			}
		})
	}
}

func TestChangedNetwork(t *testing.T) {
	t.Parallel()
	endpoint := share(t)
	state := withState(filepath.Join(t.TempDir(), "lease.json"))
	r := open(t, endpoint, state)
	acquire(t, r, claim(t, vxlanConfig, 1))
	for _, step := range []struct{ config, within string }{
		{`{"Network":"10.4.0.0/15"}`, "10.5.0.0/16"},                                               // larger: keeps the subnet
		{`{"Network":"10.9.0.0/16"}`, "10.9.0.0/16"},                                               // another network
		{`{"Network":"10.9.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:9::/48"}`, "10.9.0.0/16"}, // adds IPv6
		{`{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:9::/48"}`, "fd00:9::/48"},
		{`{"Network":"10.9.0.0/16"}`, "10.9.0.0/16"},
	} {
		l := acquire(t, open(t, endpoint, state), claim(t, step.config, 1))
		within := netip.MustParsePrefix(step.within)
		entries, _, err := r.Entries(t.Context(), false)
		if !within.Overlaps(l.Endpoints[0].Subnet) || err != nil || len(entries) != 1 || entries[0].Key != l.Key() {
			t.Errorf("%s: has %s; etcd has %v, %v", step.config, l, entries, err)
		}
	}
}

func TestStateFile(t *testing.T) {
	t.Parallel()
	endpoint := share(t)
	file := filepath.Join(t.TempDir(), "lease.json")
	log := &lines{}
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := open(t, endpoint, withState(file), log.options)
	l := acquire(t, r, claim(t, vxlanConfig, 1))
	if log.count("the state file cannot be read") == 0 {
		t.Error("a corrupt file was not logged")
	}
	if r.savedID() != l.ID {
		t.Errorf("saved %x, want %x", r.savedID(), l.ID)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	left, err := os.ReadDir(filepath.Dir(file))
	if err != nil || len(left) != 1 {
		t.Errorf("left %v, %v", left, err)
	}
	if err := r.Release(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		t.Errorf("after release: %v", err)
	}
	if entries, _, err := r.Entries(t.Context(), false); err != nil || len(entries) != 0 {
		t.Errorf("after release: %v, %v", entries, err)
	}
	if err := r.Release(t.Context(), l); err != nil {
		t.Errorf("a second time: %v", err)
	}
}
