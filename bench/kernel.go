package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"

	"culvert/backend"
	"culvert/backend/hostgw"
	"culvert/backend/ipip"
	"culvert/backend/vxlan"
	"culvert/internal/api"
	"culvert/internal/host"
)

// ownKernel is culvert's kernel datapath, with its firewall rules. As on a real node
// there can be only one per host; datapaths that share their nodes use kernel
// instead.
type ownKernel struct {
	*backend.Kernel
	undo []func() error
}

func (k *ownKernel) Status() api.Datapath { return k.Kernel.Status() }

func (k *ownKernel) Close() error {
	errs := []error{k.Kernel.Close(backend.Remove)}
	for _, undo := range k.undo {
		errs = append(errs, undo())
	}
	return errors.Join(errs...)
}

// openOwnKernel opens the datapath that the part names.
func openOwnKernel(p Part, log *slog.Logger) (carrier, error) {
	format, _, _ := strings.Cut(p.Datapath, "/")
	if format != "host-gw" {
		if err := host.Supports(format); err != nil {
			return nil, unavailable(err.Error())
		}
	}
	s, under, err := snapshot(p, format)
	if err != nil {
		return nil, err
	}
	plan := map[string]backend.Planner{"vxlan": vxlan.Plan, "ipip": ipip.Plan, "host-gw": hostgw.Plan}[format]
	k := &ownKernel{Kernel: backend.NewKernel(backend.KernelOptions{
		Node:   backend.Node{Underlay: under, PublicIPs: []netip.Addr{p.self().underlay}, ProbeInterval: backend.ProbeInterval},
		Format: format, Plan: plan, Why: "culvert bench", Log: log,
	})}
	if format == "host-gw" { // without a device the part's address is on lo
		undo, err := addLoopbackAddr(p)
		if err != nil {
			return nil, err
		}
		k.undo = append(k.undo, undo)
	}
	if err := k.Apply(context.Background(), s); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", p.Datapath, err), k.Close())
	}
	return k, nil
}
