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

	"golang.org/x/sys/unix"

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
	is      os.FileInfo // of the file as written
	removed bool        // for good
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
	f.is, _ = os.Lstat(f.path) // on an error it counts as changed
	return nil
}

// changed reports whether another program has removed, replaced or changed the file.
func (f *subnetFile) changed() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.written {
		return false
	}
	is, err := os.Lstat(f.path)
	return err != nil || f.is == nil || !os.SameFile(is, f.is) || is.Size() != f.is.Size() || !is.ModTime().Equal(f.is.ModTime())
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

// extend writes the file again with the lease's expiry, if it was written before.
func (f *subnetFile) extend(until time.Time) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.written {
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
			changed := f.changed()
			if !changed && !f.due(now, l.Expires) {
				continue
			}
			// If this fails, the existing file, if there is one, is valid until its expiry.
			err := f.extend(l.Expires)
			switch {
			case err != nil && !failing && changed:
				d.log.Error("another program removed or changed subnet.env, and it cannot be written again; the CNI plugin refuses pods", "error", err)
			case err != nil && !failing:
				d.log.Error("cannot write the lease's new expiry to subnet.env; the CNI plugin will refuse pods after the old one", "error", err)
			case err == nil && changed:
				d.log.Warn("another program removed or changed subnet.env; it is written again", "file", f.path)
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
	w := api.Warning{Check: "subnet-file", Text: err.Error(), Fix: "make room for it, or name another place with --subnet-file"}
	if p := (*os.LinkError)(nil); errors.As(err, &p) && (errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENOTEMPTY)) {
		w.Text, w.Fix = fmt.Sprintf("%s is a directory, so no pod can be added", p.New), "rmdir "+p.New
	}
	return w
}

// verifyLease has the registry verify the lease in the store, if its leases can expire.
func (s *session) verifyLease() {
	if r, ok := s.registry.(interface{ VerifyLease() }); ok {
		r.VerifyLease()
	}
}
