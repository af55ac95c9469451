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
	same.Expires = f.env.Expires
	if f.removed || f.written && reflect.DeepEqual(same, f.env) {
		return nil
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
	if err := cni.WriteSubnetEnv(f.path, env); err != nil {
		return fmt.Errorf("writing %s: %w", f.path, err)
	}
	f.env = env
	return nil
}

// due says whether the file's end is worth moving: renewals come every third
// of the lifetime or more often, and each write is synced to a disk.
func (f *subnetFile) due(now, until time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if until.IsZero() || f.env.Expires.IsZero() {
		return f.written && until.IsZero() != f.env.Expires.IsZero()
	}
	return f.written && until.Sub(f.env.Expires).Abs() > until.Sub(now).Abs()/8
}

// renewSubnetFile follows the lease's lifetime until ctx ends.
func (d *node) renewSubnetFile(ctx context.Context, f *subnetFile, held func() (subnet.Lease, bool)) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			l, ok := held()
			if !ok {
				continue
			}
			d.health.setLease(l)
			if !f.due(now, l.Expires) {
				continue
			}
			if err := f.extend(l.Expires); err != nil {
				// The file that is there goes on being true until it says no longer.
				d.log.Error("the CNI plugin will refuse pods when the old end of the lease is reached", "error", err)
			}
		}
	}
}
