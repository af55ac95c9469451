package host

import (
	"errors"
	"fmt"
	"slices"

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

// Filter is one of culvert's tc filters.
type Filter struct {
	Link   string
	Parent uint32 // netlink.HANDLE_MIN_INGRESS or HANDLE_MIN_EGRESS
	index  int
}

func (f Filter) direction() string {
	if f.Parent == netlink.HANDLE_MIN_EGRESS {
		return "egress"
	}
	return "ingress"
}

// readFilters reads culvert's filters on the links, in the order in which they may be
// removed: others send to the one on the pair of veth, where nobody else takes the packets.
func readFilters(links []netlink.Link) []Filter {
	var all []Filter
	for _, l := range links {
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			filters, err := Retry(func() ([]netlink.Filter, error) { return netlink.FilterList(l, parent) })
			if err != nil {
				break // there is no qdisc
			}
			if slices.ContainsFunc(filters, OurFilter) {
				all = append(all, Filter{l.Attrs().Name, parent, l.Attrs().Index})
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
	return all
}

// OurFilter reports whether a filter is culvert's.
func OurFilter(f netlink.Filter) bool {
	b, ok := f.(*netlink.BpfFilter)
	return ok && b.Priority == names.FilterPriority && len(b.Name) > len(names.FilterPrefix) && b.Name[:len(names.FilterPrefix)] == names.FilterPrefix
}

// wantsFilter reports whether the state allows the filter.
func (s State) wantsFilter(f Filter) bool {
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

// RemoveFilter removes a filter, and its clsact qdisc if no other filter uses
// it.
func RemoveFilter(f Filter) error {
	link := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Name: f.Link, Index: f.index}}
	err := netlink.FilterDel(&netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{
		LinkIndex: f.index, Parent: f.Parent, Priority: names.FilterPriority, Protocol: unix.ETH_P_ALL, Handle: 1,
	}})
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
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
	var errs []error
	for _, f := range readFilters([]netlink.Link{l}) {
		errs = append(errs, RemoveFilter(f))
	}
	return errors.Join(errs...)
}

// gone reports whether the error means that the object, or its link, does not
// exist.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL)
}

// Filters returns all of culvert's tc filters on this host.
func Filters() ([]Filter, error) {
	links, err := Retry(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("listing the network interfaces: %w", err)
	}
	return readFilters(links), nil
}

// DeleteCommand returns the shell command that removes the filter.
func (f Filter) DeleteCommand() string {
	return fmt.Sprintf("tc filter del dev %s %s pref %d", f.Link, f.direction(), names.FilterPriority)
}
