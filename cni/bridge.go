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

// unusableBridge is a bridge that the bridge plugin would fail on: it has addresses
// other than this node's gateway, because the node got another subnet or a program
// such as a DHCP client assigned one, or it is not set up as the plugin requires.
type unusableBridge struct {
	name    string
	link    netlink.Link
	address []netlink.Addr // addresses that prevent assigning the gateway's
	// removable are those of address that no pod can be using as its gateway.
	removable []netlink.Addr
	gateway   netip.Prefix // address that the bridge should have
	ports     int          // number of ports, of pods or others
	noMAC     bool         // as after the removal of a bridge's last port
	noIPv6    bool         // IPv6 is disabled but needed
	// foreign is why it cannot be the pods' bridge at all; empty if it can.
	foreign string
}

// bridgeName returns the bridge that is the pods' gateway; "" if the delegate does
// not use one.
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
				return "", invalid("\"delegate\" has an invalid %q: %v", key, err)
			}
		}
	}
	if !c.IsGateway && !c.IsDefault || c.ForceAddress {
		return "", nil // no gateway address, or bridge is configured to replace it
	}
	return c.Bridge, nil
}

// findUnusableBridge returns nil if the bridge is as the delegate needs it or does
// not exist yet.
func (n NetConf) findUnusableBridge(env SubnetEnv) (*unusableBridge, error) {
	name, err := n.bridgeName()
	if err != nil || name == "" {
		return nil, err
	}
	link, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		if wantsIPv6(env) && lacksIPv6("default") {
			return &unusableBridge{name: name, noIPv6: true}, nil
		}
		return nil, nil
	}
	if err != nil {
		return nil, ioFailure("finding the bridge "+name, err)
	}
	addresses, err := retryDump(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, ioFailure("reading the addresses of the bridge "+name, err)
	}
	b := unusableBridge{name: name, link: link}
	for _, gateway := range env.Gateways {
		other, free := conflicting(addresses, gateway, env.Networks)
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
	links, err := retryDump(netlink.LinkList)
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

// ipv6Switch is the sysctl that disables IPv6 on a link.
func ipv6Switch(link string) string { return "/proc/sys/net/ipv6/conf/" + link + "/disable_ipv6" }

func lacksIPv6(link string) bool {
	b, err := os.ReadFile(ipv6Switch(link))
	return err == nil && string(bytes.TrimSpace(b)) == "1"
}

// conflicting returns the addresses because of which the bridge plugin would refuse
// to assign the gateway's: of IPv4 all others, of IPv6 those that overlap the
// gateway's network or are in the cluster networks. Like the plugin, it looks in the
// kernel's order and stops at the gateway's own address. free are those that no pod
// can use as its gateway: link-local addresses, which programs assign to any link
// without an address, and the gateway's own with another prefix length, which the
// plugin assigns again.
func conflicting(addresses []netlink.Addr, gateway netip.Prefix, networks []netip.Prefix) (all, free []netlink.Addr) {
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

// repairable reports whether repair can succeed.
func (b *unusableBridge) repairable() bool {
	return b.foreign == "" && (b.ports == 0 || len(b.removable) == len(b.address))
}

// repair prepares the bridge for the delegate, which then assigns the gateway's
// address. It removes addresses that pods may use as their gateway only if the
// bridge has no ports; otherwise the administrator must move the pods.
func (b *unusableBridge) repair() error {
	if !b.repairable() {
		return b.err()
	}
	if b.link == nil { // a bridge created by the delegate could not have an IPv6 address
		attrs := netlink.NewLinkAttrs()
		attrs.Name = b.name
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil && !errors.Is(err, unix.EEXIST) {
			return ioFailure("creating the bridge "+b.name, err)
		}
	}
	if b.noIPv6 {
		if err := os.WriteFile(ipv6Switch(b.name), []byte("0"), 0); err != nil {
			return ioFailure(fmt.Sprintf("IPv6 is disabled on the bridge %s and cannot be enabled (`sysctl -w net.ipv6.conf.%s.disable_ipv6=0`)", b.name, b.name), err)
		}
	}
	if b.noMAC {
		if err := netlink.LinkSetHardwareAddr(b.link, randomMAC()); err != nil {
			return ioFailure(fmt.Sprintf("setting an Ethernet address on the bridge %s, which has none", b.name), err)
		}
	}
	for _, a := range b.address {
		if err := netlink.AddrDel(b.link, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return ioFailure(fmt.Sprintf("removing the address %s from the bridge %s", a.IPNet, b.name), err)
		}
		fmt.Fprintf(os.Stderr, "culvert-cni: removed the address %s from the bridge %s\n", a.IPNet, b.name)
	}
	return nil
}

// randomMAC returns a random locally administered unicast address.
func randomMAC() net.HardwareAddr {
	mac := make(net.HardwareAddr, 6)
	_, _ = rand.Read(mac) // never fails
	mac[0] = mac[0]&^1 | 2
	return mac
}

// replace is the remedy for a device that cannot be the pods' bridge.
func (b *unusableBridge) replace() string {
	return fmt.Sprintf("detach it (`ip link set %s nomaster`), rename or delete it, or set another \"bridge\"", b.name)
}

func (b *unusableBridge) err() error {
	if b.foreign != "" {
		return types.NewError(types.ErrTryAgainLater,
			fmt.Sprintf("%s %s: pods cannot be attached to it", b.name, b.foreign),
			b.replace())
	}
	var has []string
	for _, a := range b.address {
		has = append(has, a.IPNet.String())
	}
	return types.NewError(types.ErrTryAgainLater,
		fmt.Sprintf("the bridge %s has the address %s, but this node's subnet is %s now, and %d interfaces are still on the bridge",
			b.name, strings.Join(has, ", "), b.gateway.Masked(), b.ports),
		"delete the pods of the old subnet (drain the node); after that the plugin repairs the bridge")
}

// retryDump repeats a netlink dump that was interrupted by a concurrent change.
func retryDump[T any](dump func() ([]T, error)) ([]T, error) {
	for range 20 {
		all, err := dump()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
	return dump()
}
