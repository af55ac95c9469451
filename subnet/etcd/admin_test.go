package etcd

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"culvert/subnet"
)

func TestSetConfig(t *testing.T) {
	t.Parallel()
	r := open(t, share(t))
	text, revision, err := r.ConfigText(t.Context())
	if text != nil || revision != 0 || err != nil {
		t.Errorf("%s, %d, %v", text, revision, err)
	}
	if _, err := r.SetConfig(t.Context(), []byte(`{"Network":"10.5.0.0/31"}`), subnet.AnyRevision); err == nil {
		t.Error("accepted an invalid configuration")
	}
	first, err := r.SetConfig(t.Context(), []byte(vxlanConfig), 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, stale := range []int64{0, first - 1, first + 1} {
		if _, err := r.SetConfig(t.Context(), []byte(`{"Network":"10.6.0.0/16"}`), stale); !errors.Is(err, subnet.ErrChanged) {
			t.Errorf("at %d: %v", stale, err)
		}
	}
	if text, revision, err = r.ConfigText(t.Context()); string(text) != vxlanConfig || revision != first || err != nil {
		t.Errorf("%s, %d, %v", text, revision, err)
	}
	if second, err := r.SetConfig(t.Context(), []byte(`{"Network":"10.6.0.0/16"}`), first); err != nil || second <= first {
		t.Errorf("%d, %v", second, err)
	}
}

func TestReservations(t *testing.T) {
	t.Parallel()
	r := open(t, share(t))
	l := acquire(t, r, claim(t, vxlanConfig, 1))
	prefix := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	const other = "10.5.200.0/24"
	if l.Subnets()[0].String() == other {
		t.Fatal("the test's subnet is taken by chance")
	}
	reserved, err := r.Reserve(t.Context(), "printers", prefix(other))
	if err != nil || !reserved.Reserved || reserved.ID != 0 {
		t.Fatal(reserved, err)
	}
	for _, taken := range []string{other, "10.5.200.128/25", "10.5.128.0/17", l.Subnets()[0].String()} {
		if _, err := r.Reserve(t.Context(), "others", prefix(taken)); !errors.Is(err, subnet.ErrTaken) {
			t.Errorf("%s: %v", taken, err)
		}
	}
	for name, bad := range map[string][]netip.Prefix{"none": nil, "host bits": prefix("10.5.201.7/24"), "two": append(prefix(other), prefix("10.5.202.0/24")...)} {
		if _, err := r.Reserve(t.Context(), "others", bad); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	// A node with the owner's name does not get the reserved subnet.
	c := claim(t, vxlanConfig, 2)
	c.Node, c.Previous = "printers", prefix(other)
	if got := acquire(t, open(t, r.opts.Endpoints[0]), c); got.Overlaps(reserved) {
		t.Errorf("a node acquired the reserved %s", got)
	}

	put(t, r, "subnets/10.5.9.0-24", "oops")
	entries, _, err := r.Entries(t.Context(), true)
	if err != nil || len(entries) != 4 {
		t.Fatal(entries, err)
	}
	for _, e := range entries {
		if leased := e.ID != 0; leased != time.Now().Before(e.Expires) {
			t.Errorf("%s: handle %x, expires %v", e.Key, e.ID, e.Expires)
		}
	}

	if err := r.ReleaseKey(t.Context(), reserved.Key(), reserved.ModRevision+1); !errors.Is(err, subnet.ErrChanged) {
		t.Errorf("at another revision: %v", err)
	}
	if err := r.ReleaseKey(t.Context(), reserved.Key(), reserved.ModRevision); err != nil {
		t.Error(err)
	}
	if err := r.ReleaseKey(t.Context(), "10.5.9.0-24", subnet.AnyRevision); err != nil {
		t.Errorf("malformed entry: %v", err)
	}
	for _, at := range []int64{subnet.AnyRevision, 5} {
		if err := r.ReleaseKey(t.Context(), reserved.Key(), at); !errors.Is(err, subnet.ErrAbsent) {
			t.Errorf("again: %v", err)
		}
	}
}
