package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/names"
)

// watched is what notifications are compared with.
type watched struct {
	indexes map[uint32]bool // of our devices and the underlay
	ours    map[uint32]bool // of our devices
	others  *survey
	near    []netip.Prefix // the cluster networks
	asked   []netip.Addr   // addresses whose routes matter
	links   map[int]bool   // links that relevant routes lead to
}

func newWatched(r reading, underlay int) *watched {
	others := r.view.survey
	w := &watched{
		indexes: make(map[uint32]bool), ours: make(map[uint32]bool),
		others: others, near: others.near, links: others.links,
		asked: slices.Collect(maps.Keys(others.asked)),
	}
	for _, b := range r.podBridges {
		w.indexes[uint32(b.index)] = true
	}
	for name, i := range r.indexes {
		if names.Managed(name) || i == underlay {
			w.indexes[uint32(i)] = true
		}
		if names.Managed(name) {
			w.ours[uint32(i)] = true
		}
	}
	return w
}

// The subscribed groups of rtnetlink(7) and nfnetlink, as bits.
const (
	routeGroups = unix.RTMGRP_LINK | unix.RTMGRP_NEIGH | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV4_ROUTE |
		unix.RTMGRP_IPV6_IFADDR | unix.RTMGRP_IPV6_ROUTE |
		1<<(unix.RTNLGRP_IPV4_NETCONF-1) | 1<<(unix.RTNLGRP_IPV6_NETCONF-1) | 1<<(unix.RTNLGRP_NEXTHOP-1) |
		1<<(unix.RTNLGRP_IPV4_RULE-1) | 1<<(unix.RTNLGRP_IPV6_RULE-1)
	nftablesGroups = 1 << (unix.NFNLGRP_NFTABLES - 1)
)

// watch returns a channel that signals that something relevant may have
// changed, or that notifications were lost.
func (k *Keeper) watch() (events <-chan struct{}, stop func(), err error) {
	route, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{Groups: routeGroups})
	if err != nil {
		return nil, nil, fmt.Errorf("listening to the kernel's changes: %w", err)
	}
	conns := []*netlink.Conn{route}
	// A kernel without nftables sends no notifications.
	if nft, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{Groups: nftablesGroups}); err == nil {
		conns = append(conns, nft)
	}
	told := make(chan struct{}, 1)
	for i, c := range conns {
		concerns := concernsRoute
		if i == 1 {
			concerns = concernsNFTables
		}
		go func() {
			for {
				messages, err := c.Receive()
				if err != nil && !errors.Is(err, unix.ENOBUFS) {
					return // closed
				}
				w := k.watched.Load()
				if err != nil && w != nil { // any notification may have been lost
					w.others.changed.Store(true)
					w.others.due.Store(true)
				}
				for _, m := range messages {
					if w != nil && !concerns(w, m) {
						continue
					}
					err = unix.ENOBUFS // signal, as for lost notifications
					break
				}
				if err != nil {
					select {
					case told <- struct{}{}:
					default:
					}
				}
			}
		}()
	}
	return told, func() {
		for _, c := range conns {
			_ = c.Close()
		}
	}, nil
}

// concernsRoute decodes just enough of a message to decide whether it is about
// a device of ours, the underlay, one of our routes, or one that may lead to a
// peer.
func concernsRoute(w *watched, m netlink.Message) bool {
	d := m.Data
	switch m.Header.Type {
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		r, ok := parseRoute(d)
		if !ok || r.proto == names.RouteProtocol {
			return ok
		}
		w.others.changed.Store(true)
		if !w.matters(r) {
			return false
		}
		w.others.due.Store(true)
		return true
	case unix.RTM_NEWNEXTHOP, unix.RTM_DELNEXTHOP: // removed with their routes, which are not announced
		w.others.changed.Store(true)
		w.others.due.Store(true)
		return true
	case unix.RTM_NEWLINK, unix.RTM_DELLINK: // struct ifinfomsg
		if len(d) < unix.SizeofIfInfomsg {
			return false
		}
		index := binary.NativeEndian.Uint32(d[4:])
		// The kernel does not announce the removal of routes of a link that
		// goes down.
		if gone := m.Header.Type == unix.RTM_DELLINK || binary.NativeEndian.Uint32(d[8:])&unix.IFF_UP == 0; gone && w.links[int(index)] {
			w.others.changed.Store(true)
			w.others.due.Store(true)
			return true
		}
		return w.indexes[index] || w.named(d[unix.SizeofIfInfomsg:])
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH: // struct ndmsg
		return len(d) >= 8 && w.ours[binary.NativeEndian.Uint32(d[4:])]
	case unix.RTM_NEWADDR, unix.RTM_DELADDR: // struct ifaddrmsg
		if m.Header.Type == unix.RTM_DELADDR && len(d) >= 8 && w.links[int(binary.NativeEndian.Uint32(d[4:]))] {
			w.others.changed.Store(true)
			w.others.due.Store(true)
			return true
		}
		if len(d) >= 8 && d[0] == unix.AF_INET {
			return true // the pods' bridge may have appeared, or lost its address
		}
		return len(d) >= 8 && w.indexes[binary.NativeEndian.Uint32(d[4:])]
	}
	return true // netconf: forwarding; policy rules
}

// named reports whether a link's attributes have one of our names.
func (w *watched) named(attrs []byte) bool {
	d, err := netlink.NewAttributeDecoder(attrs)
	if err != nil {
		return true
	}
	for d.Next() {
		if d.Type() == unix.IFLA_IFNAME {
			return names.Managed(strings.TrimRight(d.String(), "\x00"))
		}
	}
	return false
}

// concernsNFTables reports the end of a transaction, of any program: other
// programs' chains concern us too.
func concernsNFTables(_ *watched, m netlink.Message) bool {
	return m.Header.Type == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWGEN
}

// Listen returns a channel that signals rtnetlink(7) notifications that matter
// to the caller. groups are RTMGRP bits. matters receives the message's type
// and body, or type 0 if notifications may have been lost; it is called from
// one goroutine. The socket belongs to the network namespace of the calling
// thread.
func Listen(groups uint32, matters func(kind uint16, body []byte) bool) (events <-chan struct{}, stop func(), err error) {
	c, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{Groups: groups})
	if err != nil {
		return nil, nil, fmt.Errorf("listening to the kernel's changes: %w", err)
	}
	told := make(chan struct{}, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			messages, err := c.Receive()
			if err != nil && !errors.Is(err, unix.ENOBUFS) {
				return // closed
			}
			tell := err != nil && matters(0, nil)
			for _, m := range messages {
				tell = matters(uint16(m.Header.Type), m.Data) || tell
			}
			if tell {
				select {
				case told <- struct{}{}:
				default:
				}
			}
		}
	}()
	return told, func() {
		_ = c.Close()
		<-ended
	}, nil
}

// RouteTo returns the prefix of a route notification, whatever its table; false
// for other messages and for the host's own addresses.
func RouteTo(body []byte) (netip.Prefix, bool) {
	r, _ := parseRoute(body)
	return r.to, r.to.IsValid() && body[4] != unix.RT_TABLE_LOCAL
}
