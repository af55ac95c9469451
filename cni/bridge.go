package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// staleBridge is a bridge whose address is not this node's: the node got
// another subnet, and pods of the old one may be on the bridge.
type staleBridge struct {
	name    string
	link    netlink.Link
	address []netlink.Addr // that disagree with subnet.env
	gateway netip.Prefix   // that the bridge should have
	ports   int            // interfaces on the bridge, of pods or whoever
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
	}{Bridge: "cni0", IsGateway: true}
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

// findStaleBridge returns nil where the bridge agrees with env or is not there
// yet.
func (n NetConf) findStaleBridge(env SubnetEnv) (*staleBridge, error) {
	name, err := n.bridgeName()
	if err != nil || name == "" {
		return nil, err
	}
	link, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, nil
	}
	if err != nil {
		return nil, ioFailure("looking at the bridge "+name, err)
	}
	addresses, err := complete(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, ioFailure("reading the addresses of the bridge "+name, err)
	}
	b := staleBridge{name: name, link: link}
	for _, gateway := range env.Gateways {
		if stale := disagreeing(addresses, gateway, env.Networks); len(stale) > 0 {
			b.address, b.gateway = append(b.address, stale...), gateway
		}
	}
	if len(b.address) == 0 {
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

// disagreeing returns the addresses that keep the bridge from being the
// gateway: with the gateway's own there, none. An IPv4 bridge has one address;
// an IPv6 one may have others, outside the cluster's network.
func disagreeing(addresses []netlink.Addr, gateway netip.Prefix, networks []netip.Prefix) []netlink.Addr {
	var out []netlink.Addr
	for _, a := range addresses {
		ip, ok := netip.AddrFromSlice(a.IP)
		if !ok || ip.Unmap().Is4() != gateway.Addr().Is4() {
			continue
		}
		ip = ip.Unmap()
		bits, _ := a.Mask.Size()
		if netip.PrefixFrom(ip, bits) == gateway {
			return nil
		}
		inside := ip.Is4()
		for _, network := range networks {
			inside = inside || network.Contains(ip)
		}
		if inside && !ip.IsLinkLocalUnicast() {
			out = append(out, a)
		}
	}
	return out
}

// repair takes the stale addresses away if nothing is on the bridge: the
// delegate then gives it the new one. While pods are on it they are the
// administrator's to move.
func (b *staleBridge) repair() error {
	if b.ports > 0 {
		return b.err()
	}
	for _, a := range b.address {
		if err := netlink.AddrDel(b.link, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return ioFailure(fmt.Sprintf("taking the old address %s from the bridge %s", a.IPNet, b.name), err)
		}
	}
	return nil
}

func (b *staleBridge) err() error {
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
