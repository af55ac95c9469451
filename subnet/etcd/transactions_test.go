package etcd

import (
	"errors"
	"testing"
	"time"

	"culvert/subnet"
)

// Each test covers one condition of a transaction, or the reaction if it does not hold,
// while another node writes concurrently.

// othersValue is a value that another node writes.
const othersValue = `{"PublicIP":"192.0.2.99","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:99"},"NodeID":"other"}`

func valueAt(t *testing.T, r *Registry, key string) string {
	t.Helper()
	resp, err := r.client.Get(t.Context(), r.subnetsDir()+key)
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Kvs) == 0 {
		return ""
	}
	return string(resp.Kvs[0].Value)
}

// A lease overwrites only the revision that was read, not what another node wrote since.
func TestWriteRequiresTheRevisionRead(t *testing.T) {
	t.Parallel()
	r := open(t, share(t))
	l := acquire(t, r, claim(t, vxlanConfig, 1))
	_, listed, err := r.entries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	put(t, r, "subnets/"+l.Key(), othersValue)
	keep := l
	var g grant
	if _, err := r.write(t.Context(), subnet.Choice{Lease: l, Keep: &keep}, listed, &g); !errors.Is(err, errRace) {
		t.Errorf("it was written: %v", err)
	}
	if got := valueAt(t, r, l.Key()); got != othersValue {
		t.Errorf("etcd has %s", got)
	}
}

// A dual-stack subnet is acquired only if nothing was written since the list: no key
// range covers its IPv6 half, so it cannot be compared.
func TestDualStackRequiresTheLatestList(t *testing.T) {
	t.Parallel()
	r := open(t, share(t))
	const config = `{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:12::/48","Backend":{"Type":"vxlan"}}`
	choice, err := subnet.Choose(claim(t, config, 1), subnet.Occupancy{})
	if err != nil {
		t.Fatal(err)
	}
	_, listed, err := r.entries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	put(t, r, "subnets/10.5.250.0-24", othersValue) // conflicts with nothing
	g := grant{}
	if err := r.ensureGranted(t.Context(), "node-1", time.Minute, &g); err != nil {
		t.Fatal(err)
	}
	choice.Lease.ID = g.id
	if _, err := r.write(t.Context(), choice, listed, &g); !errors.Is(err, errRace) {
		t.Errorf("it was taken: %v", err)
	}
}

// A new lease that overlaps an older entry of another prefix length is deleted again.
func TestOlderOverlappingLeaseWins(t *testing.T) {
	t.Parallel()
	r := open(t, share(t))
	choice, err := subnet.Choose(claim(t, vxlanConfig, 1), subnet.Occupancy{})
	if err != nil {
		t.Fatal(err)
	}
	_, listed, err := r.entries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	put(t, r, "subnets/10.5.0.0-16", othersValue)
	g := grant{}
	if err := r.ensureGranted(t.Context(), "node-1", time.Minute, &g); err != nil {
		t.Fatal(err)
	}
	choice.Lease.ID = g.id
	if l, err := r.write(t.Context(), choice, listed, &g); err == nil {
		t.Errorf("%s stands beside an older entry that covers it", l)
	}
	if got := valueAt(t, r, choice.Lease.Key()); got != "" {
		t.Errorf("it was not given back: %s", got)
	}
}

// Undoing a write and releasing a lease delete only our own write, not a later one of
// another node.
func TestOtherNodesWritesAreNotDeleted(t *testing.T) {
	t.Parallel()
	r := open(t, share(t))
	l := acquire(t, r, claim(t, vxlanConfig, 1))
	put(t, r, "subnets/"+l.Key(), othersValue)
	r.undo(t.Context(), subnet.Choice{Lease: l}, l)
	if got := valueAt(t, r, l.Key()); got != othersValue {
		t.Errorf("undoing left %q", got)
	}

	second := open(t, r.opts.Endpoints[0], at(t, "release"))
	l = acquire(t, second, claim(t, vxlanConfig, 1))
	second.client.KV = &racingKV{KV: second.client.KV, before: func() { put(t, second, "subnets/"+l.Key(), othersValue) }}
	_ = second.Release(t.Context(), l)
	if got := valueAt(t, second, l.Key()); got != othersValue {
		t.Errorf("releasing left %q", got)
	}
}

// An unanswered transaction can no longer be committed once another subnet is tried: the
// etcd lease that it needs was revoked.
func TestUnansweredWriteIsRevoked(t *testing.T) {
	t.Parallel()
	r := open(t, share(t))
	g := grant{}
	if err := r.ensureGranted(t.Context(), "node-1", time.Minute, &g); err != nil {
		t.Fatal(err)
	}
	g.unanswered = true
	before := g.id
	c := claim(t, vxlanConfig, 1)
	l, err := r.tryAcquire(t.Context(), c, &g)
	if err != nil {
		t.Fatal(err)
	}
	if l.ID == before {
		t.Error("the lease in doubt is used again")
	}
	if ends, _, err := r.timeToLive(t.Context(), before); err != nil || !ends.IsZero() {
		t.Errorf("the lease in doubt lives until %v (%v)", ends, err)
	}
}
