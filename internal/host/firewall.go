package host

import (
	"net/netip"

	"culvert/internal/firewall"
	"culvert/internal/names"
)

// firewallSteps returns the steps of package firewall.
func firewallSteps(have reading, want State) []step {
	var steps []step
	for _, s := range firewall.Diff(have.firewall, want.Firewall, have.podDevices(want)) {
		steps = append(steps, step{Change: firewallChange(s), rules: &s})
	}
	return steps
}

func firewallChange(s firewall.Step) Change {
	if s.Foreign {
		return Change{KindForward, s.Command}
	}
	return Change{KindNFTables, s.Command}
}

// podDevices returns the links that packets of the cluster networks traverse.
func (r reading) podDevices(want State) firewall.Devices {
	d := firewall.Devices{
		Underlay: firewall.Device{Name: r.view.Underlay.Name, Index: r.view.Underlay.Index},
		Pods:     firewall.Device{Name: defaultBridge}, Tunnels: make(map[netip.Prefix]firewall.Device),
	}
	for _, n := range want.Firewall.Forward {
		for _, b := range r.bearers {
			if n.Contains(b.addr.Addr()) && !b.addr.IsSingleIP() {
				d.Pods = b.Device
			}
		}
		for _, route := range want.Routes {
			if route.Link != "" && n.Contains(route.To.Addr()) && (d.Tunnels[n].Name == "" || names.Managed(route.Link)) {
				d.Tunnels[n] = firewall.Device{Name: route.Link, Index: r.indexes[route.Link]}
			}
		}
		for _, t := range want.Firewall.Tunnels {
			if t.Network == n && t.Device != "" {
				d.Tunnels[n] = firewall.Device{Name: t.Device, Index: r.indexes[t.Device]}
			}
		}
	}
	return d
}

// defaultBridge is the assumed pod bridge, if no device has an address in the
// network.
const defaultBridge = "cni0"
