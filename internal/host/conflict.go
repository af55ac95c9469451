package host

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/names"
)

// Conflict is a device of another program that prevents a datapath of ours.
type Conflict struct {
	Device string
	Why    string
}

// VXLANConflicts returns other programs' vxlan devices that conflict with ours:
// those on our UDP port and, unless we use a socket, with our VNI. Kernel
// devices with different VNIs share a port; a socket shares it with none.
func VXLANConflicts(vni uint32, port uint16, socket bool) ([]Conflict, error) {
	return conflicts(func(l netlink.Link) string {
		v, ok := l.(*netlink.Vxlan)
		if !ok || v.Port != int(port) || !socket && v.VxlanId != int(vni) {
			return ""
		}
		return fmt.Sprintf("is a vxlan device with VNI %d on UDP port %d", v.VxlanId, v.Port)
	})
}

// IPIPConflicts returns other programs' ipip devices that conflict with ours:
// those with the same local address and no remote one.
func IPIPConflicts(local netip.Addr) ([]Conflict, error) {
	return conflicts(func(l netlink.Link) string {
		v, ok := l.(*netlink.Iptun)
		if !ok || !v.Local.Equal(local.AsSlice()) || v.Remote != nil && !v.Remote.IsUnspecified() {
			return ""
		}
		return "is an ipip device with the local address " + local.String()
	})
}

func conflicts(why func(netlink.Link) string) ([]Conflict, error) {
	links, err := Retry(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("listing the network interfaces: %w", err)
	}
	var all []Conflict
	for _, l := range links {
		if w := why(l); w != "" && !names.Managed(l.Attrs().Name) {
			all = append(all, Conflict{l.Attrs().Name, w})
		}
	}
	return all, nil
}

// RemoveConflicting removes our devices of another datapath and the foreign devices that
// conflict. It installs the catch-all routes first, so that packets for the
// removed devices become unreachable instead of taking another route. A
// datapath uses it if it must open something before its state can be applied.
func RemoveConflicting(foreign []string, ours func(device string) bool, catchAll []Route) ([]Change, error) {
	have, err := read(0, &survey{})
	if err != nil {
		return nil, err
	}
	want := State{Replaces: foreign, Routes: slices.Clone(catchAll)}
	// The fast path of a device that stays carries packets meanwhile, with the veth pair.
	want.FastPath = slices.ContainsFunc(have.filters, func(f Filter) bool { return names.Managed(f.Link) && f.Link != names.JoinFar && !ours(f.Link) })
	want.ShortWay = want.FastPath
	for _, f := range have.filters {
		want.Process = append(want.Process, ProcessTunnel{VXLAN: VXLAN{Device: f.Link}})
	}
	for _, l := range have.Links {
		if !ours(l.Name) || want.FastPath && l.Veth != "" {
			want.Links = append(want.Links, l)
		}
	}
	for _, r := range have.Routes {
		if !ours(r.Link) {
			want.Routes = append(want.Routes, r)
		}
	}
	steps := slices.DeleteFunc(diff(have, want), func(s step) bool {
		return s.Kind != KindRoute && s.Kind != KindFastPath && (s.Kind != KindLink || s.link != "")
	})
	return write(have, steps)
}

// Supports reports whether the kernel can create devices of a type, vxlan or
// ipip, by creating one and deleting it. The error says why not.
func Supports(kind string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = names.Probe // without a VNI: cvt.0 is the device of a network with VNI 0
	var dev netlink.Link
	switch kind {
	case "vxlan":
		dev = &netlink.Vxlan{LinkAttrs: attrs, VxlanId: 1<<24 - 1, Port: 1}
	case "ipip":
		dev = &netlink.Iptun{LinkAttrs: attrs, Local: netip.MustParseAddr("127.0.0.67").AsSlice()}
	default:
		return fmt.Errorf("there is no kernel datapath for %s", kind)
	}
	err := netlink.LinkAdd(dev)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("the kernel has no %s devices", kind)
	case errors.Is(err, unix.EPERM):
		return errors.New("making network devices needs root, or CAP_NET_ADMIN")
	case err != nil && !errors.Is(err, unix.EEXIST):
		return fmt.Errorf("making a %s device: %w", kind, err)
	}
	if err := netlink.LinkDel(dev); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("removing the probe device of type %s: %w", kind, err)
	}
	return nil
}
