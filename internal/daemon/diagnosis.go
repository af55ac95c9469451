package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"

	"culvert/backend"
	"culvert/backend/hostgw"
	"culvert/backend/ipip"
	"culvert/backend/tunnel"
	"culvert/backend/vxlan"
	"culvert/cni"
	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/internal/overlap"
	"culvert/subnet"
	"culvert/subnet/kept"
)

// Diagnosis is what a daemon started now with the last one's options would find on this
// host. It is computed without the store and without changing anything, from the last
// daemon's files: told.json, snapshot.json, underlay.json, subnet.env.
type Diagnosis struct {
	Saved    *SavedOptions    // nil if there is no told.json
	Snapshot *subnet.Snapshot // as last read from the store; nil if there is none
	Underlay host.Underlay    // that the daemon would use; the zero Underlay if none
	Datapath Datapath         // that the daemon would choose: userspace or kernel
	State    host.State       // the desired kernel state
	Problems []host.Problem

	underlay int
	plan     host.Planner // nil if the desired state is unknown
}

// Diagnose inspects the host as a daemon with this run directory would.
func Diagnose(ctx context.Context, runDir string) (Diagnosis, error) {
	var o Diagnosis
	saved, err := LoadOptions(runDir)
	if err != nil {
		return o, err
	}
	o.Saved = saved
	if saved == nil {
		saved = &SavedOptions{SubnetFile: runDir + "/subnet.env", Store: "etcd", IPMasq: true, Datapath: Auto, FastPath: "off"}
	}
	options := saved.options(runDir)
	d := &node{options: options, log: options.Log, state: newState(options)}
	last := d.lastPlace()
	d.storeAddrs, d.flannel = last.StoreAddrs, last.Flannel
	k, ended, err := kept.Look(options.snapshotFile())
	if err != nil {
		o.warn("host-state", "", "the snapshot of %s cannot be read: %v", options.storeName(), err)
	}
	o.add(d.staleRoutes(ctx)...)
	if k == nil {
		return o, o.compareConfig(ctx, d)
	}
	if _, err := os.Stat(d.fencePath()); !errors.Is(err, fs.ErrNotExist) {
		o.warn("fenced", "delete the pods of the old subnet (drain the node), or start the daemon with --on-lost=release", "another node has the subnet %v that this node had", k.Lease.Subnets())
		return o, nil
	}
	if ended != nil {
		o.warn("lease-expired", "start the daemon: it resumes the lease or acquires another", "the lease of %v may have expired: %v", k.Lease.Subnets(), ended)
	}
	snapshot := subnet.BuildSnapshot(k.Config, k.Lease, k.Entries, k.Revision)
	return o, o.compareHost(ctx, d, snapshot)
}

// compareConfig reports why a daemon would reject the network configuration before it
// leases, if the configuration is in a file.
func (o *Diagnosis) compareConfig(ctx context.Context, d *node) error {
	if d.options.Kubernetes == nil || d.options.Kubernetes.NetConf == "" {
		return nil
	}
	text, err := os.ReadFile(d.options.Kubernetes.NetConf)
	if err != nil {
		return nil // for example outside the container
	}
	c, _, err := subnet.ParseConfig(text)
	if err != nil {
		o.warn("host-state", "correct it", "the network configuration in %s is invalid: %v", d.options.Kubernetes.NetConf, err)
		return nil
	}
	f, err := host.ReadFacts()
	if err != nil {
		return err
	}
	soft, hard := overlap.Losses(c, f, d.needs(ctx, f, host.Underlay{}))
	o.add(soft...)
	o.add(hard...)
	return nil
}

// compareHost compares the host with a snapshot's desired state.
func (o *Diagnosis) compareHost(ctx context.Context, d *node, s subnet.Snapshot) error {
	u, err := host.FindUnderlay(d.selector(), d.underlayContext(&s.Config, s.Self.Publics()))
	if err != nil {
		o.warn("underlay-gone", "restore it, or name another with --iface", "no underlay interface was found: %v", err)
		return nil
	}
	o.Underlay = u
	at := place{u, d.publics(u)}
	for _, e := range s.Self.Endpoints {
		is4 := e.Subnet.Addr().Is4()
		if i := slices.IndexFunc(at.publics, func(a netip.Addr) bool { return a.Is4() == is4 }); i < 0 || at.publics[i] != e.Public {
			o.warn("underlay-address-gone", fmt.Sprintf("ip address add %s/... dev %s, if it should have it", e.Public, u.Name),
				"the lease says that peers send to %s, but a daemon started now would use %v (%s: %s)", e.Public, at.publics, u.Name, u.Why)
		}
	}
	f, err := host.ReadFacts()
	if err != nil {
		return err
	}
	soft, hard := overlap.Losses(s.Config, f, d.needs(ctx, f, u))
	o.add(soft...)
	o.add(hard...)
	o.add(foreignAddresses(f)...)
	o.add(overlap.Networks(s.Config, s.Self.Subnets(), f.Networks(d.podLinks()))...)
	s = s.WithoutOverlaps(overlap.HostNetworks(s.Config, f.Networks(d.podLinks())))
	o.Snapshot = &s

	n := backend.Node{Underlay: u, PublicIPs: at.publics, IPMasq: d.options.IPMasq, NoMasq: d.options.NoMasq, TakeOver: d.options.TakeOverFlannel, PodBridges: cni.GatewayBridges(cniDataDirs...)}
	kind, _, err := choose(d.options.Datapath, s.Config.Backend.Type, host.Supports)
	if err != nil {
		o.warn("kernel", "", "%v", err)
		return nil
	}
	replaces, err := d.takeOver(s.Config, n, kind == Userspace)
	if err != nil {
		o.warn("port-taken", "", "%v", err)
	}
	o.Datapath = kind
	plan := map[string]backend.Planner{"vxlan": vxlan.Plan, "ipip": ipip.Plan, "host-gw": hostgw.Plan}[s.Config.Backend.Type]
	if kind == Userspace {
		plan = tunnel.Plan
	}
	if plan == nil {
		return fmt.Errorf("there is no datapath for the wire format %q", s.Config.Backend.Type)
	}
	o.underlay = u.Index
	o.plan = func(v host.View) (host.State, error) {
		w, err := plan(n, s, v)
		w.State.Replaces = replaces
		w.State.FastPath = d.options.FastPath != "off"
		return w.State, err
	}
	problems, want, err := host.Preview(o.underlay, o.plan)
	if err != nil {
		o.warn("host-state", "", "the wanted state cannot be applied to the host: %v", err)
		return nil
	}
	o.Problems, o.State = append(o.Problems, problems...), want
	return nil
}

// Repair repairs the problems that a daemon would repair, and returns the changes. It fails
// if a daemon runs in the network namespace.
func (o Diagnosis) Repair() ([]host.Change, error) {
	if o.plan == nil {
		return nil, errors.New("the wanted state of this host is unknown: start the daemon")
	}
	own, err := host.Own(host.Owner{PID: os.Getpid(), What: "culvert doctor --fix"})
	if err != nil {
		return nil, err
	}
	defer own.Release()
	return host.Repair(o.underlay, o.plan)
}

func (o *Diagnosis) warn(check, fix, format string, args ...any) {
	o.add(api.Warning{Check: check, Text: fmt.Sprintf(format, args...), Fix: fix})
}

func (o *Diagnosis) add(all ...api.Warning) {
	for _, w := range all {
		o.Problems = append(o.Problems, host.Problem{Warning: w})
	}
}
