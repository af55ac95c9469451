package host

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/firewall"
	"culvert/internal/names"
)

// Follower keeps further kernel state equal to the State. The Keeper calls it
// at each reconciliation, after it has applied the state.
type Follower interface {
	Follow(State, View) ([]Change, error)
}

// Filter is one of culvert's programs at a link: tc filters of its priority, or a program
// that is attached with tcx.
type Filter struct {
	Link   string
	Parent uint32 // netlink.HANDLE_MIN_INGRESS or HANDLE_MIN_EGRESS
	index  int
	pod    bool           // for the short way from pod to pod, at a pod's link
	tcx    ebpf.ProgramID // 0: a tc filter
}

// Parents are the values of Filter.Parent.
var Parents = []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS}

// Direction returns the name of a Filter.Parent, as tc(8) has it.
func Direction(parent uint32) string {
	if parent == netlink.HANDLE_MIN_EGRESS {
		return "egress"
	}
	return "ingress"
}

// AddClsact adds to a link the clsact qdisc that tc filters need, unless it has one.
func AddClsact(l netlink.Link) error {
	err := netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}})
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("adding the clsact qdisc to %s: %w", l.Attrs().Name, err)
	}
	return nil
}

// Registers reports whether the filter carries nothing, but is part of the Registry.
func (f Filter) Registers() bool { return f.Link == names.JoinFar && f.Parent == registryHook }

// readFilters reads culvert's filters on the links, in the order in which they may be
// removed: the others redirect to the veth pair, where only the last one's program
// handles the packets.
func readFilters(links []netlink.Link) ([]Filter, error) {
	var registry Registry
	if TCX() {
		var err error
		if registry, err = ReadRegistry(); err != nil {
			return nil, err
		}
	}
	var all []Filter
	for _, l := range links {
		a := l.Attrs()
		for _, parent := range Parents {
			if TCX() && l.Type() == "veth" { // pods' links; it is gone if there is an error
				programs, _ := Programs(a.Index, parent)
				for _, id := range Ours(programs, registry.Programs) {
					all = append(all, Filter{Link: a.Name, Parent: parent, index: a.Index, pod: true, tcx: id})
				}
			}
			filters, err := Retry(func() ([]netlink.Filter, error) { return netlink.FilterList(l, parent) })
			if err != nil {
				continue // there is no qdisc
			}
			if i := slices.IndexFunc(filters, OurFilter); i >= 0 {
				name := filters[i].(*netlink.BpfFilter).Name
				all = append(all, Filter{Link: a.Name, Parent: parent, index: a.Index, pod: a.Name != names.JoinFar && strings.HasPrefix(name, names.PodFilterPrefix)})
			}
		}
	}
	slices.SortStableFunc(all, func(a, b Filter) int {
		switch {
		case a.Link == names.JoinFar && b.Link != names.JoinFar:
			return 1
		case a.Link != names.JoinFar && b.Link == names.JoinFar:
			return -1
		}
		return 0
	})
	return all, nil
}

// OurFilter reports whether a filter is culvert's.
func OurFilter(f netlink.Filter) bool {
	b, ok := f.(*netlink.BpfFilter)
	return ok && b.Priority == names.FilterPriority && len(b.Name) > len(names.FilterPrefix) && b.Name[:len(names.FilterPrefix)] == names.FilterPrefix
}

// wantsFilter reports whether the state allows the filter.
func (s State) wantsFilter(f Filter) bool {
	if f.Registers() {
		return s.FastPath && s.ShortWay
	}
	return s.FastPath && (s.ShortWay || slices.ContainsFunc(s.Links, func(l Link) bool {
		return l.Name == f.Link || l.VXLAN != nil && l.VXLAN.Device == f.Link
	}) || slices.ContainsFunc(s.Process, func(t ProcessTunnel) bool { return t.VXLAN.Device == f.Link }) ||
		slices.ContainsFunc(s.Firewall.Tunnels, func(t firewall.TunnelRule) bool { return t.Underlay == f.Link }))
}

// filterSteps removes leftover fast-path filters, before the devices that their
// programs redirect to.
func filterSteps(have reading, want State) []step {
	var steps []step
	for _, f := range have.filters {
		if !want.wantsFilter(f) {
			steps = append(steps, step{
				Change: Change{KindFastPath, f.DeleteCommand()},
				do:     func(*writer) error { return RemoveFilter(f) },
			})
		}
	}
	return steps
}

// RemoveFilter removes a filter, and its clsact qdisc if no other filter uses it. A pod's
// link keeps the qdisc: its removal would lose packets (see TCX), and it is deleted with
// the pod.
func RemoveFilter(f Filter) error {
	if f.tcx != 0 {
		return detach(f.index, f.Parent, f.tcx)
	}
	link := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Name: f.Link, Index: f.index}}
	err := netlink.FilterDel(&netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{ // of any handle
		LinkIndex: f.index, Parent: f.Parent, Priority: names.FilterPriority, Protocol: unix.ETH_P_ALL,
	}})
	if gone(err) {
		return nil
	}
	if err != nil || f.pod {
		return err
	}
	for _, parent := range Parents {
		if left, err := netlink.FilterList(link, parent); err != nil || len(left) > 0 {
			return nil
		}
	}
	qdiscs, err := Retry(func() ([]netlink.Qdisc, error) { return netlink.QdiscList(link) })
	if err != nil {
		return nil
	}
	for _, q := range qdiscs {
		if q.Type() == "clsact" && q.Attrs().LinkIndex == f.index {
			if err := netlink.QdiscDel(q); !gone(err) {
				return err
			}
		}
	}
	return nil
}

// RemoveFilters removes culvert's filters from a link, if it has any.
func RemoveFilters(link string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return nil // gone, with its filters
	}
	filters, err := readFilters([]netlink.Link{l})
	errs := []error{err}
	for _, f := range filters {
		errs = append(errs, RemoveFilter(f))
	}
	return errors.Join(errs...)
}

// RemoveTCFilter removes culvert's tc filters from one direction of a pod's link, if it has any.
func RemoveTCFilter(name string, index int, parent uint32) error {
	link := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Name: name, Index: index}}
	filters, err := Retry(func() ([]netlink.Filter, error) { return netlink.FilterList(link, parent) })
	if err != nil || !slices.ContainsFunc(filters, OurFilter) {
		return nil // there is no qdisc
	}
	return RemoveFilter(Filter{Link: name, Parent: parent, index: index, pod: true})
}

// gone reports whether the error means that the object, or its link, does not
// exist.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL)
}

// Filters returns all of culvert's filters on this host.
func Filters() ([]Filter, error) {
	links, err := Retry(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("listing the network interfaces: %w", err)
	}
	return readFilters(links)
}

// DeleteCommand returns the shell command that removes the filter.
func (f Filter) DeleteCommand() string {
	if f.tcx != 0 {
		return fmt.Sprintf("bpftool net detach tcx_%s dev %s # program %d", Direction(f.Parent), f.Link, f.tcx)
	}
	return fmt.Sprintf("tc filter del dev %s %s pref %d", f.Link, Direction(f.Parent), names.FilterPriority)
}
