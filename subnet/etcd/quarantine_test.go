package etcd

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"culvert/subnet"
)

func withQuarantine(d time.Duration) func(*Options) { return func(o *Options) { o.Quarantine = d } }

// Of four subnets two are reserved. Two nodes release theirs, which are then in
// quarantine: a new node gets the one freed first, a returning node its own.
func TestFreedSubnetsAreQuarantined(t *testing.T) {
	t.Parallel()
	endpoint := share(t)
	const config = `{"Network":"10.5.0.0/26","SubnetLen":28,"SubnetMin":"10.5.0.0"}`
	rest := withQuarantine(time.Hour)
	admin := open(t, endpoint, rest)
	for _, p := range []string{"10.5.0.0/28", "10.5.0.16/28"} {
		if _, err := admin.Reserve(t.Context(), "printers", []netip.Prefix{mustPrefix(p)}); err != nil {
			t.Fatal(err)
		}
	}
	var left []string
	live := func(n int) (*Registry, subnet.Lease) {
		r := open(t, endpoint, rest)
		l := acquire(t, r, claim(t, config, n))
		hold(t, r, l)
		return r, l
	}
	marked := func(n int) bool {
		marks, err := admin.marks(t.Context())
		return err == nil && len(marks) == n
	}
	r1, l1 := live(1)
	eventually(t, "a mark", func() bool { return marked(1) })
	r2, l2 := live(2)
	eventually(t, "two marks", func() bool { return marked(2) })
	if rests, err := admin.Quarantined(t.Context()); err != nil || len(rests) != 0 {
		t.Errorf("in quarantine while leased: %v, %v", rests, err)
	}
	// The first is released by its node, the second later by the administrator.
	if err := r1.Release(t.Context(), l1); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond) // etcd reports the time to live in whole seconds
	if err := r2.Close(); err != nil {
		t.Fatal(err)
	}
	if err := admin.ReleaseKey(t.Context(), l2.Key(), subnet.AnyRevision); err != nil {
		t.Fatal(err)
	}
	rests, err := admin.Quarantined(t.Context())
	if err != nil || len(rests) != 2 || rests[0].Key != l1.Key() || rests[0].Node != "node-1" || rests[1].Key != l2.Key() ||
		time.Until(rests[1].Until) > time.Hour || time.Until(rests[1].Until) < 59*time.Minute {
		t.Fatalf("in quarantine: %+v, %v", rests, err)
	}
	for _, l := range []subnet.Lease{l1, l2} {
		left = append(left, l.Key())
	}

	// A new node that prefers the one freed last gets the one freed first; the
	// previous owner gets it back.
	c := claim(t, config, 3)
	c.Previous = l2.Subnets()
	if l := acquire(t, open(t, endpoint, rest), c); l.Key() != left[0] {
		t.Errorf("node-3 has %s; freed were %v", l, left)
	}
	c = claim(t, config, 2)
	c.Previous = l2.Subnets()
	if l := acquire(t, open(t, endpoint, rest), c); l.Key() != l2.Key() {
		t.Errorf("node-2 got %s, want %s", l, l2)
	}
	// A released reservation is not quarantined: no node used it.
	if err := admin.ReleaseKey(t.Context(), "10.5.0.16-28", subnet.AnyRevision); err != nil {
		t.Fatal(err)
	}
	if rests, err := admin.Quarantined(t.Context()); err != nil || slices.ContainsFunc(rests, func(r subnet.QuarantinedSubnet) bool { return r.Key == "10.5.0.16-28" }) {
		t.Errorf("%v, %v", rests, err)
	}
}

// The subnet of an expired lease is quarantined too. It is not leased while another
// is free; after the quarantine it is.
func TestExpiredSubnetsAreQuarantined(t *testing.T) {
	t.Parallel()
	endpoint := share(t)
	for name, c := range map[string]struct {
		quarantine time.Duration
		leased     bool // to another node
	}{
		"during": {time.Hour, false},
		"after":  {time.Second, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rest := func(o *Options) { at(t, name)(o); withQuarantine(c.quarantine)(o) }
			r := open(t, endpoint, rest)
			own := claim(t, vxlanConfig, 1)
			own.TTL = time.Second
			l := acquire(t, r, own)
			r.keepMark(t.Context(), l) // as Hold does; the lease is not renewed
			admin := open(t, endpoint, rest)
			eventually(t, "the expiry", func() bool { e, _, err := admin.Entries(t.Context(), false); return err == nil && len(e) == 0 })
			if c.leased {
				eventually(t, "the end of the quarantine", func() bool { rests, err := admin.Quarantined(t.Context()); return err == nil && len(rests) == 0 })
			}
			other := claim(t, vxlanConfig, 2)
			other.Previous = l.Subnets()
			if got := acquire(t, open(t, endpoint, rest), other); (got.Key() == l.Key()) != c.leased {
				t.Errorf("node-2 got %s; node-1 had %s", got, l)
			}
		})
	}
}

// The lifetime counts from before the renewal was sent, however late the response
// is read.
func TestLifetimeCountsFromTheRequest(t *testing.T) {
	t.Parallel()
	r := open(t, share(t))
	l := acquire(t, r, claim(t, vxlanConfig, 1))
	r.setHeld(l)
	r.client.Lease = slowLease{r.client.Lease}
	asked := time.Now()
	if _, err := r.keepAlive(t.Context(), l.ID); err != nil {
		t.Fatal(err)
	}
	if held, _ := r.Held(); held.Expires.After(asked.Add(30*time.Second + 400*time.Millisecond)) {
		t.Errorf("expires %v after the request", held.Expires.Sub(asked))
	}
}
