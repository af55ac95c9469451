package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"culvert/backend"
	"culvert/backend/fastpath"
	"culvert/backend/hostgw"
	"culvert/backend/ipip"
	"culvert/backend/tunnel"
	"culvert/backend/vxlan"
	"culvert/internal/host"
	"culvert/internal/priority"
	"culvert/subnet"
)

// Datapath selects what carries the packets: the kernel or the daemon.
type Datapath string

// FastPath is whether eBPF programs carry packets before the datapath. Auto means
// before the kernel's vxlan device: before the userspace datapath they make bulk faster
// and an idle request slower, and before the kernel's ipip device they are not measured
// (docs/fastpath.md).
type FastPath = fastpath.Mode

// The values of --datapath.
const (
	Auto      Datapath = "auto"
	Userspace Datapath = "userspace"
	Kernel    Datapath = "kernel"
)

// Datapaths are the values of --datapath.
func Datapaths() []string { return []string{string(Auto), string(Userspace), string(Kernel)} }

// choose selects the datapath and says why. Auto prefers the kernel, which keeps
// carrying packets while no daemon runs. supports returns an error if the kernel lacks
// a device type.
func choose(asked Datapath, format string, supports func(kind string) error) (kind Datapath, why string, err error) {
	switch asked {
	case Userspace:
		if format == "host-gw" {
			return "", "", errors.New("--datapath=userspace: host-gw has no tunnel, only the kernel's routes")
		}
		return Userspace, "--datapath=userspace", nil
	case Auto, Kernel:
	default:
		return "", "", fmt.Errorf("--datapath=%s: one of %s", asked, strings.Join(Datapaths(), ", "))
	}
	if format == "host-gw" {
		return Kernel, string(asked) + ": host-gw has no tunnel, only the kernel's routes", nil
	}
	err = supports(format)
	switch {
	case err == nil && asked == Kernel:
		return Kernel, "--datapath=kernel", nil
	case err == nil:
		return Kernel, "auto: the kernel has " + format + " devices, and forwards without a daemon", nil
	case asked == Kernel:
		return "", "", fmt.Errorf("--datapath=kernel: %w (`--datapath=userspace` needs no such device)", err)
	}
	return Userspace, "auto: " + err.Error(), nil
}

// open selects and opens the datapath. If another program's device conflicts, it
// returns an error that names it, unless it is flannel's and TakeOverFlannel is set.
func (d *node) open(ctx context.Context, c subnet.Config, l subnet.Lease, n backend.Node) (backend.Backend, error) {
	d.state.notReady("opening the datapath")
	format := c.Backend.Type
	kind, why, err := choose(d.options.Datapath, format, host.Supports)
	if err != nil {
		return nil, err
	}
	inherited, err := d.inherit(ctx, d.datapathFacts(kind, c, l, n.Underlay))
	if err != nil {
		return nil, err
	}
	d.store.add(inherited)
	replaces, err := d.takeOver(c, n, kind == Userspace)
	if err != nil {
		return nil, err
	}
	d.log.Info("datapath chosen", "wire_format", format, "datapath", kind, "why", why)
	if kind == Userspace {
		o := tunnel.Options{
			Node: n, Config: c, Lease: l, Why: why, Replaces: replaces,
			Tuning: d.options.Tunnel, Log: d.log,
		}
		if d.options.FastPath == fastpath.On {
			fast, err := fastpath.Open(d.options.FastPath, d.log)
			if err != nil {
				return nil, err
			}
			o.FastPath = fast
		}
		o.Inherited = d.store.take()
		t, err := tunnel.Open(o)
		if err != nil {
			return nil, err
		}
		if err := d.store.keep(t.Descriptors()); err != nil {
			d.log.Warn("a restart will interrupt the packets", "error", err)
		}
		return t, nil
	}
	if err := priority.Lower(); err != nil {
		d.log.Debug("cannot lower the priority, which only carrying packets needs", "error", err)
	}
	// Close stored sockets: they occupy the port that the kernel's device needs.
	if err := d.store.keep(nil); err != nil {
		d.log.Warn("cannot remove what an earlier datapath stored with systemd", "error", err)
	}
	k := backend.KernelOptions{Node: n, Format: format, Why: why, Replaces: replaces, Sources: l.Subnets(), Log: d.log}
	switch format {
	case "vxlan":
		k.Plan = vxlan.Plan
		fast, err := fastpath.Open(d.options.FastPath, d.log)
		if err != nil {
			return nil, err
		}
		k.FastPath = fast
	case "ipip":
		k.Plan = ipip.Plan
		if d.options.FastPath == fastpath.On {
			fast, err := fastpath.Open(d.options.FastPath, d.log)
			if err != nil {
				return nil, err
			}
			k.FastPath = fast
		}
	case "host-gw":
		k.Plan = hostgw.Plan
	default:
		return nil, fmt.Errorf("there is no kernel datapath for the wire format %q", format)
	}
	return backend.NewKernel(k), nil
}

// interrupts reports whether opening this datapath ends another one that carries
// packets on this host: the running daemon's, or flannel's.
func (d *node) interrupts(c subnet.Config, l subnet.Lease, n backend.Node) bool {
	if !d.takeover.pending() && !d.options.TakeOverFlannel {
		return false
	}
	kind, _, err := choose(d.options.Datapath, c.Backend.Type, host.Supports)
	if err != nil {
		return false
	}
	if t := d.takeover; t != nil && !t.taken && differences(t.offer.Datapath, d.datapathFacts(kind, c, l, n.Underlay)) != "" {
		return true
	}
	replaces, err := d.takeOver(c, n, kind == Userspace)
	return err == nil && len(replaces) > 0
}

// takeOver returns flannel's devices to replace with ours, or an error that names a
// conflicting device.
func (d *node) takeOver(c subnet.Config, n backend.Node, socket bool) ([]string, error) {
	var found []host.Conflict
	var err error
	switch c.Backend.Type {
	case "vxlan":
		found, err = host.VXLANConflicts(c.Backend.VNI, c.Backend.Port, socket)
	case "ipip":
		if local := n.Underlay.Addr(true); local.IsValid() {
			found, err = host.IPIPConflicts(local)
		}
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, f := range found {
		if d.options.TakeOverFlannel && strings.HasPrefix(f.Device, "flannel") {
			names = append(names, f.Device)
			continue
		}
		help := fmt.Sprintf("remove it (`ip link del %s`), or give the network another VNI or port (`culvert config set`)", f.Device)
		if strings.HasPrefix(f.Device, "flannel") {
			help = "stop flanneld on this node, and start culvert with --take-over-flannel"
		}
		return nil, fmt.Errorf("the device %s %s, which this node needs: %s", f.Device, f.Why, help)
	}
	return names, nil
}

// stalePods describes the pods whose MTU differs from the one that new pods get.
func stalePods(gateways []netip.Prefix, mtu int) []string {
	stale, err := host.StalePods(gateways, mtu)
	if err != nil {
		return []string{err.Error()}
	}
	return stale
}
