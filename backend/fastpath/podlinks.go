package fastpath

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"culvert/internal/host"
)

// podLink is the host's end of a pod's veth.
type podLink struct {
	name   string
	index  int
	bridge host.MAC // the Ethernet address of the bridge that it is a port of
	clsact bool     // it has the qdisc
}

// Reasons why a pod is left out of the short way (api.PodPath.LeftOut).
const (
	leftNoVeth     = "not behind a veth into another network namespace"
	leftXDP        = "an XDP program in the pod"
	leftShaped     = "a qdisc on its link"
	leftClassified = "another program's tc filter or tcx program on its link"
	leftNoClsact   = "no clsact qdisc on its link, which this kernel adds only at the cost of packets: recreate the pod"
)

// podLinks lists the host's ends of pods' veths: ports of a bridge with an address in
// one of the subnets. A port whose traffic is shaped or classified is left out,
// since the short way would bypass that; and one whose other end it cannot deliver to: in
// this network namespace (bpf_redirect_peer), or with an XDP program. left counts
// them by reason. registered are programs of culvert's.
func podLinks(subnets []netip.Prefix, q qdiscs, registered []ebpf.ProgramID) (pods []podLink, left map[string]int, err error) {
	ports, err := host.PortsOf(func(a netip.Prefix) bool {
		return slices.ContainsFunc(subnets, func(s netip.Prefix) bool { return s.Contains(a.Addr()) })
	})
	if err != nil || len(ports) == 0 {
		return nil, nil, err
	}
	longest, err := maxMTUs()
	if err != nil {
		return nil, nil, err
	}
	left = make(map[string]int)
	for _, l := range ports {
		a := l.Attrs()
		clsact := q.clsact[a.Index]
		switch {
		case l.Bridge.Type() != "bridge":
		case l.Type() != "veth" || a.NetNsID < 0:
			left[leftNoVeth]++
		case longest[a.Index] != vethMaxMTU:
			left[leftXDP]++
		case q.shaped[a.Index] != "":
			left[leftShaped]++
		case clsact && filtered(l) || host.TCX() && others(a.Index, registered):
			left[leftClassified]++
		case !host.TCX() && !clsact && a.RawFlags&unix.IFF_UP != 0:
			left[leftNoClsact]++
		default:
			pods = append(pods, podLink{a.Name, a.Index, host.MAC(l.Bridge.Attrs().HardwareAddr), clsact})
		}
	}
	return pods, left, nil
}

// vethMaxMTU is the longest MTU of a veth (ETH_MAX_MTU). An XDP program on the other end
// sets another limit, whatever network namespace that end is in (veth_xdp_set in
// drivers/net/veth.c).
const vethMaxMTU = 65535

// maxMTUs returns the longest MTU that each link may be given, by index.
func maxMTUs() (map[int]uint32, error) {
	return host.Retry(func() (map[int]uint32, error) {
		request := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
		request.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
		answers, err := request.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
		if err != nil {
			return nil, fmt.Errorf("listing the network interfaces: %w", err)
		}
		all := make(map[int]uint32, len(answers))
		for _, b := range answers {
			attributes, err := nl.ParseRouteAttr(b[unix.SizeofIfInfomsg:])
			if err != nil {
				return nil, fmt.Errorf("listing the network interfaces: %w", err)
			}
			for _, a := range attributes {
				if a.Attr.Type == unix.IFLA_MAX_MTU {
					all[int(nl.DeserializeIfInfomsg(b).Index)] = binary.NativeEndian.Uint32(a.Value)
				}
			}
		}
		return all, nil
	})
}

// filtered reports whether another program has a tc filter on the link.
func filtered(l netlink.Link) bool {
	for _, parent := range host.Parents {
		filters, err := host.Retry(func() ([]netlink.Filter, error) { return netlink.FilterList(l, parent) })
		if err == nil && slices.ContainsFunc(filters, func(f netlink.Filter) bool { return !host.OurFilter(f) }) {
			return true
		}
	}
	return false
}

// others reports whether another program is attached to the link with tcx.
func others(index int, registered []ebpf.ProgramID) bool {
	for _, parent := range host.Parents {
		programs, err := host.Programs(index, parent)
		if err == nil && len(host.Ours(programs, registered)) < len(programs) {
			return true
		}
	}
	return false
}

// followPods attaches the programs to the pods' links, and removes them from links that
// are no longer wanted, for instance since another program shapes what they carry. A link
// to which they cannot be attached is left out: its pod's packets take the host's way.
//
// A pod's link is in use, and to give it a clsact qdisc costs packets. So the programs are
// attached with tcx, and on a kernel without it only where there is a qdisc already,
// which the CNI plugin adds.
func (p *Path) followPods(want contents) error {
	if host.TCX() {
		registry, err := host.ReadRegistry()
		if err != nil || !registry.Exists() { // its link is created again before the next call
			return err
		}
		p.registry = registry
		for _, name := range []string{programPodOut, programPodIn} {
			if err := p.registry.Add(name, p.loaded.Programs[name], p.ids[name]); err != nil {
				return err
			}
		}
	}
	wanted := make(map[string]bool)
	for _, h := range want.podHooks {
		wanted[h.link] = true
		changes, err := p.attachToPod(h)
		if err != nil {
			p.log.Debug("no short way", "link", h.link, "why", err)
		}
		for _, c := range changes { // a new pod's link is no repair
			p.log.Debug("short way", "command", c.Command)
		}
	}
	if p.podLinks == nil { // what an earlier daemon has left
		filters, err := host.Filters()
		if err != nil {
			return err
		}
		p.podLinks = make(map[string]bool)
		for _, f := range filters {
			p.podLinks[f.Link] = true
		}
		for _, h := range want.hooks {
			delete(p.podLinks, h.link)
		}
	}
	for name := range p.podLinks {
		if !wanted[name] {
			if err := host.RemoveFilters(name); err != nil {
				return err
			}
		}
	}
	p.podLinks = wanted
	p.mu.Lock()
	p.short = len(wanted)
	p.mu.Unlock()
	if host.TCX() {
		if err := p.registry.Remove(func(id ebpf.ProgramID) bool { return !p.loads(id) }); err != nil {
			return err
		}
	}
	return p.nextGeneration()
}

// loads reports whether a program is one of this Path's.
func (p *Path) loads(id ebpf.ProgramID) bool {
	return slices.Contains(slices.Collect(maps.Values(p.ids)), id)
}

// attachToPod attaches a program to a pod's link, and then removes what an earlier daemon
// has attached there. In between both programs see the packets, the new one first: it has
// no flow yet, and leaves all packets to the host's way.
func (p *Path) attachToPod(h hook) ([]host.Change, error) {
	if !host.TCX() {
		return p.attach([]hook{h})
	}
	attached, err := host.Programs(h.index, h.parent)
	if err != nil {
		return nil, err
	}
	id := p.ids[h.program]
	earlier := host.Ours(slices.DeleteFunc(slices.Clone(attached), func(a ebpf.ProgramID) bool { return a == id }), p.registry.Programs)
	var changes []host.Change
	if !slices.Contains(attached, id) || len(earlier) > 0 {
		if err := host.Attach(h.index, h.parent, p.loaded.Programs[h.program], earlier); err != nil {
			return nil, fmt.Errorf("attaching %s to %s: %w", h.program, h.link, err)
		}
		changes = append(changes, host.Change{Kind: host.KindFastPath, Command: fmt.Sprintf(
			"bpftool net attach tcx_%s id %d dev %s # %s", host.Direction(h.parent), id, h.link, h.program)})
	}
	if h.clsact {
		return changes, host.RemoveTCFilter(h.link, h.index, h.parent)
	}
	return changes, nil
}
