package tunnel

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	netlinkattr "github.com/mdlayher/netlink"
	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/backend"
	"culvert/encap"
	"culvert/internal/host"
	"culvert/internal/names"
)

// uplink watches what super-frames depend on: that the underlay interface segments
// tunnel packets itself (otherwise cutting in userspace is faster; IPIP does not need
// it), and the neighbour that leads to each peer. Both can change at any time; while
// either is missing, frames are sent through the sockets.
//
// Kernel notifications and a timer trigger the same refresh.
type uplink struct {
	node    backend.Node
	device  *superDevice
	offload *encap.Offload
	table   func() *encap.Table
	log     *slog.Logger

	routed atomic.Bool // a route has changed
	// used is the peers' addresses and next hops, to filter notifications.
	used atomic.Pointer[ways]

	mu   sync.Mutex
	why  string // why super-frames are off; "" if they are on
	link netlink.Link
	// gateways caches the next hop of each underlay address: the address itself if it is
	// on the link, invalid if its route does not use the uplink. It is cleared when a
	// route changes.
	gateways   map[netip.Addr]netip.Addr
	neighbours map[netip.Addr][6]byte
}

// ways are the peers' underlay addresses and their next hops.
type ways struct {
	to   []netip.Addr
	hops map[netip.Addr]bool
}

// When the uplink is refreshed.
const (
	// uplinkCheck is the interval without notifications; if a refresh is slow, at most
	// 1/uplinkShare of the time is spent on it.
	uplinkCheck = 3 * time.Second
	uplinkShare = 300
	// uplinkPause gathers notifications; refreshing for them takes at most 1/uplinkBusy
	// of the time.
	uplinkPause = 50 * time.Millisecond
	uplinkBusy  = 20
	// uplinkForget is how often the routes to all peers are looked up again: some vanish
	// without a notification, such as those of a link that goes down.
	uplinkForget = time.Minute
)

// run refreshes until ctx ends.
func (u *uplink) run(ctx context.Context) error {
	changed, stop, err := host.Listen(uplinkGroups, u.matters)
	if err != nil {
		u.log.Warn("cannot subscribe to kernel notifications; changes are noticed late, by the periodic check", "error", err)
		changed, stop = nil, func() {}
	}
	defer stop()
	forget := time.NewTicker(uplinkForget)
	defer forget.Stop()
	u.routed.Store(true)
	for {
		began := time.Now()
		u.refresh()
		took := time.Since(began)
		timer := time.NewTimer(max(uplinkCheck, uplinkShare*took))
		pause := time.Duration(0)
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-forget.C:
			u.routed.Store(true)
		case <-changed:
			pause = max(uplinkPause, uplinkBusy*took)
		}
		timer.Stop()
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

const uplinkGroups = unix.RTMGRP_LINK | unix.RTMGRP_NEIGH | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE |
	unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR | unix.RTMGRP_IPV4_RULE | 1<<(unix.RTNLGRP_IPV6_RULE-1) | 1<<(unix.RTNLGRP_NEXTHOP-1)

// matters reports whether a notification concerns the uplink, the next hop to a peer,
// or a route to one. On a busy host most do not.
func (u *uplink) matters(kind uint16, body []byte) bool {
	index := uint32(u.node.Underlay.Index)
	if len(body) < 8 {
		u.routed.Store(true)
		return true // notifications were lost
	}
	switch kind {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK: // struct ifinfomsg
		return binary.NativeEndian.Uint32(body[4:]) == index || u.device.link.Attrs().Index == int(binary.NativeEndian.Uint32(body[4:]))
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH: // struct ndmsg
		return binary.NativeEndian.Uint32(body[4:]) == index && u.leads(body)
	case unix.RTM_NEWADDR: // struct ifaddrmsg
		return false
	case unix.RTM_DELADDR: // its routes vanish without a notification
		if binary.NativeEndian.Uint32(body[4:]) != index {
			return false
		}
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		to, ok := host.RouteTo(body)
		if !ok || !u.toPeer(to) {
			return false
		}
	}
	u.routed.Store(true)
	return true
}

// leads reports whether a neighbour is the next hop to a peer.
func (u *uplink) leads(body []byte) bool {
	attrs, err := netlinkattr.NewAttributeDecoder(body[unix.SizeofNdMsg:])
	if err != nil {
		return true
	}
	for attrs.Next() {
		if attrs.Type() == unix.NDA_DST {
			a, ok := netip.AddrFromSlice(attrs.Bytes())
			used := u.used.Load()
			return !ok || used != nil && used.hops[a.Unmap()]
		}
	}
	return false
}

// toPeer reports whether a prefix contains a peer's address.
func (u *uplink) toPeer(to netip.Prefix) bool {
	used := u.used.Load()
	return used != nil && slices.ContainsFunc(used.to, to.Contains)
}

// refresh checks the uplink, reads its neighbours and the routes, and sets the next hops
// of the current table's peers.
func (u *uplink) refresh() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.gateways == nil || u.routed.Swap(false) {
		u.gateways = make(map[netip.Addr]netip.Addr)
	}
	why := u.check()
	if why == nil {
		u.neighbours, why = neighboursOf(u.link.Attrs().Index)
	}
	on := why == nil
	switch {
	case on && u.why != "":
		u.log.Info("super-frames on", "device", names.SuperFrame, "uplink", u.node.Underlay.Name)
	case !on && u.why != why.Error():
		u.log.Info("super-frames off: large frames are cut in userspace", "reason", why)
	}
	u.why = ""
	if !on {
		u.why = why.Error()
		u.offload.SuperFrame.Store(false)
		return
	}
	u.fill(u.table())
	u.offload.SuperFrame.Store(true)
}

// check returns why the uplink cannot take super-frames, or nil after it has made sure
// that the device redirects to it.
func (u *uplink) check() error {
	link, err := netlink.LinkByIndex(u.node.Underlay.Index)
	if err != nil {
		return fmt.Errorf("looking up %s: %w", u.node.Underlay.Name, err)
	}
	a := link.Attrs()
	name := a.Name // may have been renamed
	switch {
	case a.Flags&net.FlagUp == 0:
		return fmt.Errorf("%s is down", name)
	case len(a.HardwareAddr) != 6:
		return fmt.Errorf("%s is no Ethernet interface", name)
	}
	u.link = link
	if !u.device.udp {
		// Software segmentation in the kernel is still faster than one raw socket message
		// per packet.
		return u.device.redirect(a.Index)
	}
	tool, err := ethtool.NewEthtool()
	if err != nil {
		return fmt.Errorf("asking for the features of %s: %w", name, err)
	}
	defer tool.Close()
	features, err := tool.Features(name)
	if err != nil {
		return fmt.Errorf("asking for the features of %s: %w", name, err)
	}
	for _, f := range []string{"tx-tcp-segmentation", "tx-udp_tnl-csum-segmentation"} {
		if !features[f] {
			return fmt.Errorf("%s does not segment tunnels itself (ethtool -k: %s off)", name, f)
		}
	}
	return u.device.redirect(a.Index)
}

// fill sets the known next hops of a table's peers. The table may not be in use yet.
func (u *uplink) fill(t *encap.Table) {
	own := [6]byte(u.link.Attrs().HardwareAddr)
	used := ways{hops: make(map[netip.Addr]bool)}
	defer u.used.Store(&used)
	for _, p := range t.Peers() {
		to := p.Underlay.Addr()
		source := u.node.Underlay.Addr(to.Is4())
		via := u.gateway(to, source)
		used.to, used.hops[via] = append(used.to, to), true
		mac, ok := u.neighbours[via]
		if !ok {
			p.SetNextHop(nil)
			continue
		}
		p.SetNextHop(&encap.NextHop{MAC: mac, Uplink: own, Source: source, MTU: u.link.Attrs().MTU})
	}
}

// prepare fills a new table before the loop uses it, if super-frames are on.
func (u *uplink) prepare(t *encap.Table) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.why == "" && u.link != nil {
		u.fill(t)
	}
}

// gateway returns the next hop to an underlay address, or the zero Addr if its route
// does not use the uplink.
func (u *uplink) gateway(to, source netip.Addr) netip.Addr {
	if via, ok := u.gateways[to]; ok {
		return via
	}
	var via netip.Addr
	routes, err := netlink.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{SrcAddr: source.AsSlice()})
	if err == nil && len(routes) == 1 && routes[0].LinkIndex == u.link.Attrs().Index && routes[0].Encap == nil {
		via = to
		if gw, ok := netip.AddrFromSlice(routes[0].Gw); ok {
			via = gw.Unmap()
		} else if routes[0].Via != nil {
			via = netip.Addr{}
		}
	}
	u.gateways[to] = via
	return via
}

// neighboursOf returns an interface's neighbours with a known Ethernet address.
func neighboursOf(link int) (map[netip.Addr][6]byte, error) {
	const valid = netlink.NUD_PERMANENT | netlink.NUD_NOARP | netlink.NUD_REACHABLE | netlink.NUD_STALE | netlink.NUD_DELAY | netlink.NUD_PROBE
	list, err := host.Retry(func() ([]netlink.Neigh, error) { return netlink.NeighList(link, unix.AF_UNSPEC) })
	if err != nil {
		return nil, fmt.Errorf("listing neighbours: %w", err)
	}
	known := make(map[netip.Addr][6]byte, len(list))
	for _, n := range list {
		if a, ok := netip.AddrFromSlice(n.IP); ok && n.State&valid != 0 && len(n.HardwareAddr) == 6 {
			known[a.Unmap()] = [6]byte(n.HardwareAddr)
		}
	}
	return known, nil
}

// status reports whether super-frames are on, and why not.
func (u *uplink) status() (on bool, why string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch {
	case u.why != "":
		return false, u.why
	case !u.offload.SuperFrame.Load():
		return false, "the kernel refused it in use"
	}
	known := 0
	peers := u.table().Peers()
	for _, p := range peers {
		if p.HasNextHop() {
			known++
		}
	}
	if known < len(peers) {
		return true, fmt.Sprintf("the neighbours of %d of %d peers are known", known, len(peers))
	}
	return true, ""
}
