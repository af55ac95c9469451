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

// subnetFile is the daemon's subnet.env: written when the node is ready, and
// again as the lease is renewed, since the file says how long the CNI plugin
// may rely on it. So a node whose lease runs out, with or without a daemon,
// takes no more pods.
type subnetFile struct {
	path string

	mu      sync.Mutex
	env     cni.SubnetEnv
	written bool
	removed bool // and stays so
}

// subnetEnv says what the plugin may give to pods.
func subnetEnv(c subnet.Config, l subnet.Lease, mtu int) cni.SubnetEnv {
	env := cni.SubnetEnv{MTU: mtu, IPMasq: true, Expires: l.Expires}
	for _, n := range c.Networks {
		env.Networks = append(env.Networks, n.Prefix)
	}
	env.Gateways = gateways(l.Subnets())
	return env
}

// gateways returns the address in each subnet that is the node's, to its pods.
func gateways(subnets []netip.Prefix) []netip.Prefix {
	var all []netip.Prefix
	for _, s := range subnets {
		all = append(all, netip.PrefixFrom(s.Addr().Next(), s.Bits()))
	}
	return all
}

// write makes the file say env, if it does not but for its end, which due and
// extend are about.
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

// put writes env, with its end by both clocks. The caller has mu.
func (f *subnetFile) put(env cni.SubnetEnv) error {
	env.ExpiresUp, env.Boot = 0, ""
	if !env.Expires.IsZero() {
		now, err := boottime.Now()
		if err != nil {
			return err
		}
		env.ExpiresUp, env.Boot = now.Up+time.Until(env.Expires), now.Boot
		env.Expires = env.Expires.Round(0) // by the wall clock from now on
	}
	if err := cni.WriteSubnetEnv(f.path, env); err != nil {
		return fmt.Errorf("writing %s: %w", f.path, err)
	}
	f.env, f.written = env, true
	return nil
}

// remove takes the file away for good: the subnet is not this node's any more.
func (f *subnetFile) remove() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.written, f.removed = false, true
	if err := os.Remove(f.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the lost subnet's file: %w", err)
	}
	return nil
}

// extend moves the end of the lease in the file, if there is a file.
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

// due says whether the file's end is worth moving: the wall clock was set, or
// the lease was renewed. Renewals come every third of the lifetime or more
// often, and each write is synced to a disk.
func (f *subnetFile) due(now, until time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if until.IsZero() || f.env.Expires.IsZero() {
		return f.written && until.IsZero() != f.env.Expires.IsZero()
	}
	return f.written && until.Round(0).Sub(f.env.Expires).Abs() > max(until.Sub(now).Abs()/8, clockSlack)
}

// clockSlack is what clocks may differ by without having been set: they are
// slewed, and read one after the other.
const clockSlack = 500 * time.Millisecond

// clocks tells of a wall clock that is set, and of a machine that was suspended,
// by how far the clocks have gone since the last look.
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

// renewSubnetFile follows the lease's lifetime until ctx ends. look has the
// store asked about the lease.
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
				d.log.Warn("the clock was set, or the machine was suspended: asking whether the lease stands",
					"set_by", set.Round(time.Millisecond), "suspended", suspended.Round(time.Millisecond))
				look()
			}
			now := time.Now()
			l, ok := held()
			if !ok {
				continue
			}
			d.health.setLease(l)
			if !f.due(now, l.Expires) {
				continue
			}
			// The file that is there goes on being true until it says no longer.
			err := f.extend(l.Expires)
			if err != nil && !failing {
				d.log.Error("the CNI plugin will refuse pods when the old end of the lease is reached", "error", err)
			}
			if failing = err != nil; failing {
				d.health.setWarnings("subnet-file", subnetFileWarning(err))
			} else {
				d.health.setWarnings("subnet-file")
			}
		}
	}
}

// subnetFileWarning says that subnet.env cannot be written.
func subnetFileWarning(err error) api.Warning {
	return api.Warning{Check: "subnet-file", Text: err.Error(), Fix: "make room for it, or name another place with --subnet-file"}
}

// look has the store asked whether the lease still stands, if it is one that has
// leases that end.
func (s *session) look() {
	if r, ok := s.registry.(interface{ VerifyLease() }); ok {
		r.VerifyLease()
	}
}
