package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"culvert/cni"
	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/internal/statefile"
)

// OnLost is what a node does if another node holds its subnet.
type OnLost string

// The values of --on-lost.
const (
	// Fence keeps the node fenced until it has no pod of the old subnet.
	Fence OnLost = "fence"
	// Release leases another subnet at once. Pods of the old one stay cut off until
	// they are deleted.
	Release OnLost = "release"
)

// fenceInterval is how often a fenced node checks for pods of the old subnet.
const fenceInterval = time.Second

// maxRecord is the maximum size in bytes of the daemon's small records.
const maxRecord = 64 << 10

func (d *node) fencePath() string { return filepath.Join(d.options.RunDir, "fenced.json") }

// fence is the first step after a lease is lost: it removes subnet.env, so that the
// plugin adds no pods, and writes the fence mark for a restart. The datapath is closed
// afterwards.
func (s *session) fence(cause error) error {
	mark := api.Fenced{Subnets: s.lease.Subnets(), Since: time.Now().UTC(), Reason: cause.Error()}
	s.state.setFenced(&mark)
	return errors.Join(s.file.remove(), s.saveFence(mark))
}

func (d *node) saveFence(mark api.Fenced) error {
	text, err := json.Marshal(mark)
	if err == nil {
		err = os.MkdirAll(d.options.RunDir, 0o755)
	}
	if err == nil {
		err = statefile.Write(d.fencePath(), append(text, '\n'), 0o644)
	}
	if err != nil {
		return fmt.Errorf("keeping the mark of the fence: %w", err)
	}
	d.log.Error("fenced: another node holds this node's subnet; its pods are cut off, and no other subnet is leased", "subnet", mark.Subnets, "reason", mark.Reason)
	return nil
}

// loadFence returns the fence mark, or nil if there is none. A mark that cannot be
// read is an error, so that the node does not start unfenced.
func (d *node) loadFence() (*api.Fenced, error) {
	text, err := statefile.Read(d.fencePath(), maxRecord)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var mark api.Fenced
	if err == nil {
		err = json.Unmarshal(text, &mark)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the mark of a fence (remove %s if no pod of a lost subnet is on this node): %w", d.fencePath(), err)
	}
	return &mark, nil
}

// waitFenced blocks while this node is fenced: by a mark, or because another node
// took the subnet of this node's pods while no daemon ran here.
func (d *node) waitFenced(ctx context.Context, r store, at place) error {
	mark, err := d.loadFence()
	if err == nil && mark == nil {
		mark, err = d.checkTaken(ctx, r, at)
	}
	if err != nil || mark == nil {
		return err
	}
	d.state.setFenced(mark)
	if err := d.leaveUnreachable(); err != nil {
		d.log.Error("cannot remove the lost subnet's objects from the kernel", "error", err)
	}
	if d.options.OnLost == Release {
		d.log.Warn("no longer fenced", "subnet", mark.Subnets, "why", "--on-lost=release")
		return d.unfence()
	}
	tick := time.NewTicker(fenceInterval)
	defer tick.Stop()
	for said := -1; ; {
		pods, err := host.PodsIn(mark.Subnets)
		switch {
		case err != nil:
			d.log.Warn("cannot count the pods of the lost subnet", "error", err)
		case pods == 0:
			d.log.Info("no longer fenced", "subnet", mark.Subnets, "why", "no pod of it is left")
			return d.unfence()
		case pods != said:
			said = pods
			d.log.Warn("fenced until the pods of the lost subnet are deleted, or --on-lost=release", "subnet", mark.Subnets, "pods", pods)
			waiting := *mark
			waiting.Pods = pods
			d.state.setFenced(&waiting)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// checkTaken checks, before leasing, whether another node took the subnet of this
// node's pods while no daemon held it. If so it fences this node.
func (d *node) checkTaken(ctx context.Context, r store, at place) (*api.Fenced, error) {
	previous := d.previousSubnets()
	if len(previous) == 0 {
		return nil, nil
	}
	if pods, err := host.PodsIn(previous); err != nil || pods == 0 {
		return nil, err
	}
	d.state.notReady("asking " + d.options.storeName() + " whether this node still has the subnet of its pods")
	who, err := r.TakenBy(ctx, d.options.Node, at.publics, previous)
	if err != nil || who == "" {
		return nil, err
	}
	r.Forget()
	mark := api.Fenced{Subnets: previous, Since: time.Now().UTC(), Reason: who}
	if err := os.Remove(d.options.SubnetFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("removing the lost subnet's file: %w", err)
	}
	return &mark, d.saveFence(mark)
}

func (d *node) unfence() error {
	// The pods' bridge keeps its address in the lost subnet until the next pod is
	// added. Remember the subnet, so that it does not count as a network of the host.
	if mark, err := d.loadFence(); err == nil && mark != nil {
		d.leasedSubnets = append(d.leasedSubnets, mark.Subnets...)
	}
	if err := os.Remove(d.fencePath()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the mark of the fence: %w", err)
	}
	d.state.setFenced(nil)
	return nil
}

// leaveUnreachable removes culvert's kernel state except unreachable routes for the cluster
// network, so that packets of cut-off pods do not leave by the default route.
func (d *node) leaveUnreachable() error {
	var state host.State
	for _, p := range d.state.networks() {
		state.Routes = append(state.Routes, host.Route{To: p, Metric: host.UnreachableMetric})
	}
	changes, err := host.Apply(state)
	for _, c := range changes {
		d.log.Info("host changed", "command", c.Command)
	}
	return err
}

// previousSubnets returns the subnets in subnet.env; none if the file is missing or
// unreadable.
func (d *node) previousSubnets() []netip.Prefix {
	env, err := cni.ReadSubnetEnv(d.options.SubnetFile)
	if err != nil {
		d.log.Debug("no earlier subnet", "reason", err)
		return nil
	}
	d.state.setNetworks(env.Networks)
	return env.Subnets()
}
