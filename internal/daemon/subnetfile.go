package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"reflect"
	"sync"
	"time"

	"culvert/cni"
	"culvert/internal/api"
	"culvert/internal/boottime"
	"culvert/subnet"
)

// subnetFile is the daemon's subnet.env. It is written when the node is ready and again
// as the lease is renewed: it contains the lease's expiry, after which the CNI plugin
// adds no pods, whether a daemon runs or not.
type subnetFile struct {
	path string

	mu      sync.Mutex
	env     cni.SubnetEnv
	written bool
	removed bool // for good
}

// subnetEnv builds the content of subnet.env.
func subnetEnv(c subnet.Config, l subnet.Lease, mtu int) cni.SubnetEnv {
	env := cni.SubnetEnv{MTU: mtu, IPMasq: true, Expires: l.Expires}
	for _, n := range c.Networks {
		env.Networks = append(env.Networks, n.Prefix)
	}
	env.Gateways = gateways(l.Subnets())
	return env
}

// gateways returns the first host address of each subnet, which is the pods' gateway.
func gateways(subnets []netip.Prefix) []netip.Prefix {
	var all []netip.Prefix
	for _, s := range subnets {
		all = append(all, netip.PrefixFrom(s.Addr().Next(), s.Bits()))
	}
	return all
}

// write writes env if it differs from the file in more than the expiry, which extend
// updates. After remove it does nothing.
func (f *subnetFile) write(env cni.SubnetEnv) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	same := env
	same.Expires, same.ExpiresUp, same.Boot = f.env.Expires, f.env.ExpiresUp, f.env.Boot
	if f.removed || f.written && reflect.DeepEqual(same, f.env) {
		return nil
	}
	return f.put(env)
}

// put writes env, with the expiry by both clocks. The caller holds mu.
func (f *subnetFile) put(env cni.SubnetEnv) error {
	env.ExpiresUp, env.Boot = 0, ""
	if !env.Expires.IsZero() {
		now, err := boottime.Now()
		if err != nil {
			return err
		}
		env.ExpiresUp, env.Boot = now.Up+time.Until(env.Expires), now.Boot
		env.Expires = env.Expires.Round(0) // drop the monotonic reading
	}
	if err := cni.WriteSubnetEnv(f.path, env); err != nil {
		return fmt.Errorf("writing %s: %w", f.path, err)
	}
	f.env, f.written = env, true
	return nil
}

// remove removes the file for good, after the subnet is lost or released.
func (f *subnetFile) remove() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.written, f.removed = false, true
	if err := os.Remove(f.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the lost subnet's file: %w", err)
	}
	return nil
}

// extend updates the expiry in the file, if it was written.
func (f *subnetFile) extend(until time.Time) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.written || f.env.Expires.Equal(until) {
		return nil
	}
	env := f.env
	env.Expires = until
	return f.put(env)
}

// due reports whether the file's expiry should be updated: the wall clock was set, or
// the lease was renewed. Small differences are ignored, since renewals come every third
// of the lifetime or more often and each write is synced to disk.
func (f *subnetFile) due(now, until time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if until.IsZero() || f.env.Expires.IsZero() {
		return f.written && until.IsZero() != f.env.Expires.IsZero()
	}
	return f.written && until.Round(0).Sub(f.env.Expires).Abs() > max(until.Sub(now).Abs()/8, clockSlack)
}

// clockSlack is how far the clocks may drift apart without having been set: they are
// slewed, and not read at the same instant.
const clockSlack = 500 * time.Millisecond

// clocks detects a set wall clock and a suspended machine, by comparing how far each
// clock has advanced.
type clocks struct {
	at time.Time // by the wall clock and CLOCK_MONOTONIC
	up time.Duration
}

// look returns by how much the wall clock was set since the last look, and for
// how long the machine was suspended.
func (c *clocks) look() (set, suspended time.Duration) {
	up, err := boottime.Up()
	if err != nil {
		return 0, 0
	}
	before, now := *c, clocks{time.Now(), up}
	*c = now
	if before.up == 0 {
		return 0, 0
	}
	gone := now.up - before.up
	return now.at.Round(0).Sub(before.at.Round(0)) - gone, gone - now.at.Sub(before.at)
}

// renewSubnetFile keeps the file's expiry and the status up to date until ctx ends. It
// calls look, which verifies the lease, after a clock change or a suspend.
func (d *node) renewSubnetFile(ctx context.Context, f *subnetFile, held func() (subnet.Lease, bool), look func()) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var c clocks
	failing := false
	for c.look(); ; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if set, suspended := c.look(); set.Abs() > clockSlack || suspended > clockSlack {
				d.log.Warn("the clock was set, or the machine was suspended: verifying the lease",
					"set_by", set.Round(time.Millisecond), "suspended", suspended.Round(time.Millisecond))
				look()
			}
			now := time.Now()
			l, ok := held()
			if !ok {
				continue
			}
			d.state.setLease(l)
			if !f.due(now, l.Expires) {
				continue
			}
			// If this fails, the existing file is valid until its expiry.
			err := f.extend(l.Expires)
			if err != nil && !failing {
				d.log.Error("cannot write the lease's new expiry to subnet.env; the CNI plugin will refuse pods after the old one", "error", err)
			}
			if failing = err != nil; failing {
				d.state.setWarnings("subnet-file", subnetFileWarning(err))
			} else {
				d.state.setWarnings("subnet-file")
			}
		}
	}
}

// subnetFileWarning warns that subnet.env cannot be written.
func subnetFileWarning(err error) api.Warning {
	return api.Warning{Check: "subnet-file", Text: err.Error(), Fix: "make room for it, or name another place with --subnet-file"}
}

// verifyLease has the registry verify the lease in the store, if its leases can expire.
func (s *session) verifyLease() {
	if r, ok := s.registry.(interface{ VerifyLease() }); ok {
		r.VerifyLease()
	}
}
