package daemon

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"culvert/cni"
	"culvert/internal/boottime"
)

func TestSubnetFileFollowsTheLease(t *testing.T) {
	f := &subnetFile{path: filepath.Join(t.TempDir(), "subnet.env")}
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	ends := func() time.Time {
		t.Helper()
		env, err := cni.ReadSubnetEnv(f.path)
		if err != nil {
			t.Fatal(err)
		}
		return env.Expires
	}
	// Before the node is ready there is no file, and renewals create none.
	if f.due(now, now.Add(time.Hour)) {
		t.Error("a file that was not written is due")
	}
	if err := errors.Join(f.extend(now.Add(time.Hour)), f.write(cni.SubnetEnv{
		Networks: []netip.Prefix{netip.MustParsePrefix("10.5.0.0/16")}, Gateways: []netip.Prefix{netip.MustParsePrefix("10.5.72.1/24")},
		MTU: 1450, Expires: now.Add(24 * time.Hour),
	})); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		after time.Duration // since the start
		left  time.Duration // of the lease, then; 0: it never expires
		due   bool
	}{
		{8 * time.Second, 24 * time.Hour, false}, // renewed by too little to write
		{2 * time.Hour, 24 * time.Hour, false},
		{4 * time.Hour, 24 * time.Hour, true},
		{4 * time.Hour, 20 * time.Hour, false}, // not renewed
		{time.Minute, time.Minute, true},       // a shorter lifetime
		{time.Minute, 0, true},
	} {
		at := now.Add(c.after)
		until := at.Add(c.left)
		if c.left == 0 {
			until = time.Time{}
		}
		if got := f.due(at, until); got != c.due {
			t.Errorf("after %s, with %s left: due %t", c.after, c.left, got)
		}
	}
	for _, until := range []time.Time{now.Add(48 * time.Hour), now, {}, now.Add(time.Hour)} {
		if err := f.extend(until); err != nil || !ends().Equal(until) {
			t.Errorf("the file ends at %s, not %s (%v)", ends(), until, err)
		}
	}
}

// F5: after the wall clock is set, the file is rewritten and clocks reports it.
func TestF5ClockIsSet(t *testing.T) {
	f := &subnetFile{path: filepath.Join(t.TempDir(), "subnet.env")}
	until := time.Now().Add(24 * time.Hour)
	if err := f.write(cni.SubnetEnv{
		Networks: []netip.Prefix{netip.MustParsePrefix("10.5.0.0/16")}, Gateways: []netip.Prefix{netip.MustParsePrefix("10.5.72.1/24")},
		MTU: 1450, Expires: until,
	}); err != nil {
		t.Fatal(err)
	}
	// As if the file had been written under another wall clock.
	for _, years := range []int{6, -6} {
		f.env.Expires = f.env.Expires.AddDate(years, 0, 0)
		if !f.due(time.Now(), until) {
			t.Errorf("set by %d years, and the file is not due", years)
		}
		if err := f.extend(until); err != nil {
			t.Fatal(err)
		}
		env, err := cni.ReadSubnetEnv(f.path)
		if err != nil || until.Sub(env.Expires).Abs() > time.Second || f.due(time.Now(), until) {
			t.Errorf("the file ends at %s, not %s (%v)", env.Expires, until, err)
		}
		up, err := boottime.Up()
		if left := env.ExpiresUp - up; err != nil || left > 24*time.Hour || left < 24*time.Hour-5*time.Second {
			t.Errorf("by the other clock %s are left (%v)", left, err)
		}
	}
	var c clocks
	c.look()
	if set, suspended := c.look(); set.Abs() > clockSlack || suspended.Abs() > clockSlack {
		t.Errorf("set by %s, suspended for %s", set, suspended)
	}
	c.at = c.at.Round(0).Add(-time.Hour) // without CLOCK_MONOTONIC
	if set, _ := c.look(); (set - time.Hour).Abs() > clockSlack {
		t.Errorf("a clock that was set by an hour was set by %s", set)
	}
	c.up -= time.Hour
	if _, suspended := c.look(); (suspended - time.Hour).Abs() > clockSlack {
		t.Errorf("suspended for %s, not an hour", suspended)
	}
}

// Another program removes, empties or replaces the file: it is found changed, and written
// again. A directory in its place is named.
func TestSubnetFileIsRestored(t *testing.T) {
	f := &subnetFile{path: filepath.Join(t.TempDir(), "subnet.env")}
	if f.changed() {
		t.Error("a file that was not written is changed")
	}
	if err := f.write(cni.SubnetEnv{
		Networks: []netip.Prefix{netip.MustParsePrefix("10.5.0.0/16")}, Gateways: []netip.Prefix{netip.MustParsePrefix("10.5.72.1/24")}, MTU: 1450,
	}); err != nil || f.changed() {
		t.Fatalf("changed %t (%v)", f.changed(), err)
	}
	want, err := os.ReadFile(f.path)
	if err != nil {
		t.Fatal(err)
	}
	for name, harm := range map[string]func() error{
		"removed": func() error { return os.Remove(f.path) },
		"emptied": func() error { return os.Truncate(f.path, 0) },
		"a link":  func() error { return errors.Join(os.Remove(f.path), os.Symlink("/dev/null", f.path)) },
	} {
		if err := harm(); err != nil {
			t.Fatal(err)
		}
		if !f.changed() {
			t.Errorf("%s: not noticed", name)
		}
		if err := f.extend(f.env.Expires); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got, err := os.ReadFile(f.path); err != nil || string(got) != string(want) || f.changed() {
			t.Errorf("%s: afterwards it is %q, changed %t (%v)", name, got, f.changed(), err)
		}
	}
	if err := errors.Join(os.Remove(f.path), os.Mkdir(f.path, 0o755)); err != nil {
		t.Fatal(err)
	}
	err = f.extend(f.env.Expires)
	if w := subnetFileWarning(err); err == nil || !f.changed() || w.Fix != "rmdir "+f.path {
		t.Errorf("a directory: changed %t, %v, %+v", f.changed(), err, w)
	}
}
