package tunnel

import (
	"cmp"
	"net/netip"

	"golang.org/x/sys/unix"

	"culvert/backend"
	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/internal/names"
	"culvert/subnet"
)

// The eBPF fast path (package fastpath) carries packets between the TUN device and the
// uplink without this process; what it leaves, the loop carries.
//
//	pods ── culvert0 ──┬── culvert_out ─────── uplink
//	                   └── loop ── sockets ──┘

// fastPath is the fast path as a part of the host's state.
type fastPath struct {
	backend.FastPath
	tunnel *Tunnel
}

// Follow attaches the fast path, or detaches it.
func (f fastPath) Follow(s host.State, v host.View) ([]host.Change, error) {
	if s.FastPath {
		f.tunnel.coalesce(false) // before the programs see a packet
	}
	changes, err := f.FastPath.Follow(s, v)
	f.tunnel.coalesce(!f.Status().On)
	return changes, err
}

// coalesce has the kernel coalesce datagrams for the loop (UDP_GRO), or not: the programs
// could not take them apart, and would leave their flows to the loop.
func (t *Tunnel) coalesce(on bool) {
	value := 0
	if on {
		value = 1
	}
	for _, fd := range t.receivers {
		_ = unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, value)
	}
}

// processTunnels describes the tunnel to the fast path, one per address family.
func (t *Tunnel) processTunnels(s subnet.Snapshot, v host.View) []host.ProcessTunnel {
	o := t.options
	var all []host.ProcessTunnel
	for _, e := range o.Lease.Endpoints {
		is4 := e.Public.Is4()
		p := host.ProcessTunnel{
			Link: names.TUN, Subnet: e.Subnet,
			VXLAN: host.VXLAN{
				MAC: host.MAC(e.VTEP.MAC), VNI: e.VTEP.VNI, Local: o.Node.Underlay.Addr(is4),
				Device: cmp.Or(v.Underlay.Name, o.Node.Underlay.Name),
			},
		}
		if t.overUDP() {
			p.VXLAN.Port = o.Config.Backend.Port
		}
		switch {
		case o.DontFragment && t.overUDP():
			p.Unfit = "it does not set DF in outer packets (--df)"
		case o.CopyDSCP:
			p.Unfit = "it does not copy the inner DSCP (--copy-dscp)"
		}
		for _, peer := range backend.Peers(s, is4) {
			p.Peers = append(p.Peers, host.ProcessPeer{Inner: peer.Subnet, Outer: peer.Public, MAC: host.MAC(peer.VTEP.MAC)})
		}
		all = append(all, p)
	}
	return all
}

// fastPassed returns with which peers the fast path has exchanged packets since the last
// call, by their subnets.
func (t *Tunnel) fastPassed() map[netip.Prefix]host.PeerActivity {
	if t.options.FastPath == nil {
		return nil
	}
	all := make(map[netip.Prefix]host.PeerActivity)
	for _, p := range t.options.FastPath.Activity() {
		all[p.Inner] = p
	}
	return all
}

// describeFastPath adds the fast path's state and traffic to the status.
func (t *Tunnel) describeFastPath(s *api.Datapath) {
	if t.options.FastPath != nil {
		backend.DescribeFastPath(s, t.options.FastPath.Status())
	}
}
