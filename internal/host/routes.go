package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/mdlayher/netlink"
	vnetlink "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/names"
)

// rawRoute is a decoded route of the main table.
type rawRoute struct {
	to          netip.Prefix
	index       int // of the link
	via, source netip.Addr
	metric      int
	kind, proto uint8
	flags       uint32
	hops        bool // multipath
	other       bool // the gateway is of the other family (RTA_VIA)
}

// parseRoute decodes an rtnetlink message (rtnetlink(7), struct rtmsg); false
// if it is not a route of the main table, or is a cached one.
func parseRoute(d []byte) (rawRoute, bool) {
	if len(d) < unix.SizeofRtMsg || d[0] != unix.AF_INET && d[0] != unix.AF_INET6 {
		return rawRoute{}, false
	}
	r := rawRoute{proto: d[5], kind: d[7], flags: binary.NativeEndian.Uint32(d[8:])}
	table := uint32(d[4])
	to := netip.IPv4Unspecified()
	if d[0] == unix.AF_INET6 {
		to = netip.IPv6Unspecified()
	}
	attrs, err := netlink.NewAttributeDecoder(d[unix.SizeofRtMsg:])
	if err != nil || r.flags&unix.RTM_F_CLONED != 0 {
		return rawRoute{}, false
	}
	for attrs.Next() {
		switch b := attrs.Bytes(); attrs.Type() {
		case unix.RTA_DST:
			to, _ = netip.AddrFromSlice(b)
		case unix.RTA_OIF:
			r.index = int(attrs.Uint32())
		case unix.RTA_GATEWAY:
			r.via, _ = netip.AddrFromSlice(b)
		case unix.RTA_PREFSRC:
			r.source, _ = netip.AddrFromSlice(b)
		case unix.RTA_PRIORITY:
			r.metric = int(attrs.Uint32())
		case unix.RTA_TABLE:
			table = attrs.Uint32()
		case unix.RTA_MULTIPATH:
			r.hops = true
		case unix.RTA_VIA:
			r.other = true
		}
	}
	r.to = netip.PrefixFrom(to, int(d[1]))
	return r, attrs.Err() == nil && r.to.IsValid() && table == unix.RT_TABLE_MAIN
}

// dumpRoutes calls each with the main table's routes of a protocol, 0 for all.
// The kernel filters them (NETLINK_GET_STRICT_CHK, Linux 4.20); older kernels
// send all, which takes longer.
func dumpRoutes(protocol uint8, each func(rawRoute), families ...uint8) error {
	c, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetOption(netlink.GetStrictCheck, true)
	for _, family := range families {
		header := make([]byte, unix.SizeofRtMsg)
		header[0], header[4], header[5] = family, unix.RT_TABLE_MAIN, protocol
		request := netlink.Message{Header: netlink.Header{Type: unix.RTM_GETROUTE, Flags: netlink.Request | netlink.Dump}, Data: header}
		if _, err := c.Send(request); err != nil {
			return err
		}
		interrupted := false
		for m, err := range c.ReceiveIter() {
			if errors.Is(err, unix.ENOENT) {
				break // the family's table does not exist yet
			}
			if err != nil {
				return err
			}
			interrupted = interrupted || m.Header.Flags&netlink.DumpInterrupted != 0
			if r, ok := parseRoute(m.Data); ok && m.Header.Type == unix.RTM_NEWROUTE && (protocol == 0 || r.proto == protocol) {
				each(r)
			}
		}
		if interrupted {
			return vnetlink.ErrDumpInterrupted
		}
	}
	return nil
}

// listRoutes is dumpRoutes as a list. It retries interrupted dumps.
func listRoutes(protocol uint8, families ...uint8) ([]rawRoute, error) {
	all, err := Retry(func() ([]rawRoute, error) {
		var all []rawRoute
		err := dumpRoutes(protocol, func(r rawRoute) { all = append(all, r) }, families...)
		return all, err
	})
	if err != nil {
		return nil, fmt.Errorf("listing the routes: %w", err)
	}
	return all, nil
}

// survey caches what is known of other programs' routes. There may be a million
// (a full Internet table), so they are not read at each reconciliation, but
// when a plan first asks, and after a change that may concern what was asked.
//
//	notification ── concerns what was asked? ─┬─ no: ignore
//	                                          └─ yes: read at the next reconciliation
type survey struct {
	filters bool // culvert's tc filters have been searched on every link

	// Set by the watch: changed for any route, due for a relevant one.
	changed, due atomic.Bool

	underlay int            // interface index
	names    map[int]string // of links by index
	read     bool
	at       time.Time     // of the last read
	took     time.Duration // duration of the last read
	putOff   bool          // a read is due but was too soon
	foreign  []foreignRoute
	local    map[podRoute]bool // routes within the cluster networks without a gateway
	near     []netip.Prefix    // the cluster networks that foreign is limited to
	direct   map[netip.Prefix]onLink
	lengths  map[int]bool // prefix lengths in direct, those of IPv6 plus 33
	links    map[int]bool // that routes in foreign or direct lead to
	// asked are the addresses that plans have asked about, asking those of the
	// current plan.
	asked, asking map[netip.Addr]bool
}

// begin is called before a plan runs, end after it.
func (s *survey) begin(linkNames map[int]string, underlay int) {
	s.read = s.read && s.underlay == underlay
	s.names, s.underlay, s.asking = linkNames, underlay, make(map[netip.Addr]bool)
	if s.asked == nil {
		s.asked = make(map[netip.Addr]bool)
	}
}

func (s *survey) end() {
	if len(s.asked) > len(s.asking) {
		s.asked = s.asking
	}
}

// surveyShare limits reads to 1/surveyShare of the time.
const surveyShare = 50

// refresh reads the routes if that is due and not too soon; now forces it.
func (s *survey) refresh(now bool) error {
	if s.read && !now {
		if !s.due.Load() {
			return nil
		}
		if s.putOff = time.Since(s.at) < surveyShare*s.took; s.putOff {
			return nil
		}
	}
	began := time.Now()
	s.changed.Store(false)
	s.due.Store(false)
	_, err := Retry(func() (struct{}, error) {
		s.foreign, s.direct, s.lengths, s.links = nil, make(map[netip.Prefix]onLink), make(map[int]bool), make(map[int]bool)
		s.local = make(map[podRoute]bool)
		ours := make(map[netip.Prefix]bool)
		return struct{}{}, dumpRoutes(0, func(r rawRoute) {
			if r.proto == names.RouteProtocol {
				ours[r.to] = true
				return
			}
			s.note(r, ours)
		}, unix.AF_INET, unix.AF_INET6)
	})
	if err != nil {
		s.read = false
		return fmt.Errorf("listing the routes: %w", err)
	}
	s.read, s.putOff, s.at, s.took = true, false, time.Now(), time.Since(began)
	return nil
}

func (s *survey) note(r rawRoute, ours map[netip.Prefix]bool) {
	if slices.ContainsFunc(s.near, func(n netip.Prefix) bool { return n.Bits() <= r.to.Bits() && n.Contains(r.to.Addr()) }) {
		if f, ok := foreignOf(r, s.names, ours); ok {
			s.foreign = append(s.foreign, f)
			s.links[r.index] = true
		}
		if r.kind == unix.RTN_UNICAST && !r.via.IsValid() && !r.other && !r.hops {
			s.local[podRoute{r.to.Masked(), r.index}] = true
			s.links[r.index] = true
		}
	}
	if len(s.asked) == 0 {
		return
	}
	l := onLink{
		metric: r.metric,
		onLink: r.index == s.underlay && !r.via.IsValid() && !r.other && !r.hops && r.kind == unix.RTN_UNICAST,
	}
	if have, ok := s.direct[r.to]; !ok || l.metric < have.metric {
		s.direct[r.to] = l
		s.lengths[lengthKey(r.to)] = true
		s.links[r.index] = true
	}
}

// podRoute is a route to pods of this node.
type podRoute struct {
	to   netip.Prefix
	link int
}

// leads reports whether a link's route leads to a subnet.
func (s *survey) leads(subnet netip.Prefix, link int) bool { return s.local[podRoute{subnet, link}] }

func lengthKey(p netip.Prefix) int {
	if p.Addr().Is4() {
		return p.Bits()
	}
	return 33 + p.Bits()
}

// within limits foreign to the cluster networks.
func (s *survey) within(networks []netip.Prefix) error {
	if len(networks) == 0 {
		s.foreign = nil
		return nil
	}
	other := !slices.Equal(networks, s.near)
	s.near = slices.Clone(networks)
	return s.refresh(other)
}

// onLink reports whether an address is reached by the underlay's link without a
// gateway, by the most specific route that is not ours.
func (s *survey) onLink(a netip.Addr) bool {
	s.asking[a] = true
	first := len(s.asked) == 0 // direct has not been read yet
	if !s.asked[a] {
		s.asked[a] = true
		if s.changed.Load() {
			s.due.Store(true)
		}
	}
	if err := s.refresh(first || !s.read); err != nil {
		return false
	}
	for bits := a.BitLen(); bits >= 0; bits-- {
		p, _ := a.Prefix(bits)
		if !s.lengths[lengthKey(p)] {
			continue
		}
		if r, ok := s.direct[p]; ok {
			return r.onLink
		}
	}
	return false
}

// matters reports whether a change of another program's route concerns what was
// asked.
func (w *watched) matters(r rawRoute) bool {
	if r.proto == unix.RTPROT_RA {
		return true
	}
	if slices.ContainsFunc(w.near, func(n netip.Prefix) bool { return n.Bits() <= r.to.Bits() && n.Contains(r.to.Addr()) }) {
		return true
	}
	return slices.ContainsFunc(w.asked, r.to.Contains)
}
