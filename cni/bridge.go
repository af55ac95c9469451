package cni

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// wornBridge is a bridge on which the delegate would fail: it has other addresses
// than this node's gateway, since the node got another subnet, or a program such
// as a DHCP client gave it one of its own; or it is not as the delegate makes it.
type wornBridge struct {
	name    string
	link    netlink.Link
	address []netlink.Addr // that keep the gateway's from being given
	// removable are those of address that no pod can need.
	removable []netlink.Addr
	gateway   netip.Prefix // that the bridge should have
	ports     int          // interfaces on the bridge, of pods or whoever
	noMAC     bool         // as an empty bridge is when its last port has gone
	noIPv6    bool         // although it is to have an IPv6 address
	// foreign says why it cannot be the pods' bridge at all; empty if it can.
	foreign string
}

// bridgeName is the bridge that the delegate puts pods on as their gateway; ""
// if it does no such thing.
func (n NetConf) bridgeName() (string, error) {
	kind, err := n.delegateType()
	if err != nil || kind != "bridge" {
		return "", err
	}
	if ipam, err := n.ipamType(); err != nil || ipam != "host-local" {
		return "", err
	}
	c := struct {
		Bridge       string `json:"bridge"`
		IsGateway    bool   `json:"isGateway"`
		IsDefault    bool   `json:"isDefaultGateway"`
		ForceAddress bool   `json:"forceAddress"`
	}{Bridge: DefaultBridge, IsGateway: true}
	for key, to := range map[string]any{
		"bridge": &c.Bridge, "isGateway": &c.IsGateway, "isDefaultGateway": &c.IsDefault, "forceAddress": &c.ForceAddress,
	} {
		if raw, ok := n.DelegateConf[key]; ok {
			if err := json.Unmarshal(raw, to); err != nil {
				return "", invalid("\"delegate\" has a %q that cannot be read: %v", key, err)
			}
		}
	}
	if !c.IsGateway && !c.IsDefault || c.ForceAddress {
		return "", nil // no address, or the administrator said to overwrite it
	}
	return c.Bridge, nil
}

// findWornBridge returns nil where the bridge is as the delegate needs it, or is
// not there yet.
func (n NetConf) findWornBridge(env SubnetEnv) (*wornBridge, error) {
	name, err := n.bridgeName()
	if err != nil || name == "" {
		return nil, err
	}
	link, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		if wantsIPv6(env) && lacksIPv6("default") {
			return &wornBridge{name: name, noIPv6: true}, nil
		}
		return nil, nil
	}
	if err != nil {
		return nil, ioFailure("looking at the bridge "+name, err)
	}
	addresses, err := complete(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, ioFailure("reading the addresses of the bridge "+name, err)
	}
	b := wornBridge{name: name, link: link}
	for _, gateway := range env.Gateways {
		other, free := disagreeing(addresses, gateway, env.Networks)
		if len(other) > 0 {
			b.address, b.removable, b.gateway = append(b.address, other...), append(b.removable, free...), gateway
		}
	}
	b.noMAC = len(bytes.Trim(link.Attrs().HardwareAddr, "\x00")) == 0
	b.noIPv6 = wantsIPv6(env) && lacksIPv6(name)
	if _, ok := link.(*netlink.Bridge); !ok {
		b.foreign = fmt.Sprintf("is a %s device, not a bridge", link.Type())
	} else if link.Attrs().MasterIndex != 0 {
		b.foreign = "is itself a port of " + linkName(link.Attrs().MasterIndex)
	}
	if len(b.address) == 0 && !b.noMAC && !b.noIPv6 && b.foreign == "" {
		return nil, nil
	}
	links, err := complete(netlink.LinkList)
	if err != nil {
		return nil, ioFailure("reading the ports of the bridge "+name, err)
	}
	for _, l := range links {
		if l.Attrs().MasterIndex == link.Attrs().Index {
			b.ports++
		}
	}
	return &b, nil
}

func linkName(index int) string {
	if l, err := netlink.LinkByIndex(index); err == nil {
		return l.Attrs().Name
	}
	return fmt.Sprintf("the interface with index %d", index)
}

func wantsIPv6(env SubnetEnv) bool {
	for _, g := range env.Gateways {
		if g.Addr().Is6() {
			return true
		}
	}
	return false
}

// ipv6Switch is the setting by which a link refuses IPv6 addresses.
func ipv6Switch(link string) string { return "/proc/sys/net/ipv6/conf/" + link + "/disable_ipv6" }

func lacksIPv6(link string) bool {
	b, err := os.ReadFile(ipv6Switch(link))
	return err == nil && string(bytes.TrimSpace(b)) == "1"
}

// disagreeing returns the addresses at which the delegate refuses to give the
// bridge the gateway's, in the kernel's order: those of IPv4, and of IPv6 those whose
// network overlaps with the gateway's or that are of the cluster; what comes after
// the gateway's own it does not see. Free are those that no pod can have as its
// gateway: link-local ones, which programs give to any link without an address,
// and the gateway's own with another prefix length, which comes back at once.
func disagreeing(addresses []netlink.Addr, gateway netip.Prefix, networks []netip.Prefix) (all, free []netlink.Addr) {
	for _, a := range addresses {
		ip, ok := netip.AddrFromSlice(a.IP)
		if !ok || ip.Unmap().Is4() != gateway.Addr().Is4() {
			continue
		}
		ip = ip.Unmap()
		bits, _ := a.Mask.Size()
		p := netip.PrefixFrom(ip, bits)
		if p == gateway {
			return all, free
		}
		inside := ip.Is4() || p.Overlaps(gateway)
		for _, network := range networks {
			inside = inside || network.Contains(ip)
		}
		if !inside || ip.Is6() && ip.IsLinkLocalUnicast() {
			continue
		}
		all = append(all, a)
		if ip.IsLinkLocalUnicast() || ip == gateway.Addr() {
			free = append(free, a)
		}
	}
	return all, free
}

// repairable says whether repair would succeed.
func (b *wornBridge) repairable() bool {
	return b.foreign == "" && (b.ports == 0 || len(b.removable) == len(b.address))
}

// repair makes the bridge fit for the delegate, which then gives it the gateway's
// address. Addresses that pods may have as their gateway are taken away only if
// nothing is on the bridge: else they are the administrator's to move.
func (b *wornBridge) repair() error {
	if !b.repairable() {
		return b.err()
	}
	if b.link == nil { // made here, since the delegate's could not have an IPv6 address
		attrs := netlink.NewLinkAttrs()
		attrs.Name = b.name
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil && !errors.Is(err, unix.EEXIST) {
			return ioFailure("making the bridge "+b.name, err)
		}
	}
	if b.noIPv6 {
		if err := os.WriteFile(ipv6Switch(b.name), []byte("0"), 0); err != nil {
			return ioFailure(fmt.Sprintf("IPv6 is off on the bridge %s, and cannot be turned on (`sysctl -w net.ipv6.conf.%s.disable_ipv6=0`)", b.name, b.name), err)
		}
	}
	if b.noMAC {
		if err := netlink.LinkSetHardwareAddr(b.link, randomMAC()); err != nil {
			return ioFailure(fmt.Sprintf("giving the bridge %s, which has none, an Ethernet address", b.name), err)
		}
	}
	for _, a := range b.address {
		if err := netlink.AddrDel(b.link, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return ioFailure(fmt.Sprintf("taking the address %s from the bridge %s", a.IPNet, b.name), err)
		}
		fmt.Fprintf(os.Stderr, "culvert-cni: took the address %s from the bridge %s\n", a.IPNet, b.name)
	}
	return nil
}

// randomMAC is a unicast address that is nobody's by assignment.
func randomMAC() net.HardwareAddr {
	mac := make(net.HardwareAddr, 6)
	_, _ = rand.Read(mac) // never fails
	mac[0] = mac[0]&^1 | 2
	return mac
}

func (b *wornBridge) err() error {
	if b.foreign != "" {
		return types.NewError(types.ErrTryAgainLater,
			fmt.Sprintf("%s %s, and pods cannot be put on it", b.name, b.foreign),
			fmt.Sprintf("take it off (`ip link set %s nomaster`), rename or delete it, or give the delegate another \"bridge\"", b.name))
	}
	var has []string
	for _, a := range b.address {
		has = append(has, a.IPNet.String())
	}
	return types.NewError(types.ErrTryAgainLater,
		fmt.Sprintf("the bridge %s has the address %s, but this node's subnet is %s now, and %d interfaces are still on the bridge",
			b.name, strings.Join(has, ", "), b.gateway.Masked(), b.ports),
		"delete the pods of the old subnet (drain the node): with the last of them gone the plugin corrects the bridge itself")
}

// complete repeats a netlink dump that a change of what it lists interrupted.
func complete[T any](dump func() ([]T, error)) ([]T, error) {
	for range 20 {
		all, err := dump()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
	return dump()
}
