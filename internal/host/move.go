package host

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	// moveSettle lets changes accumulate: if an address is replaced, it is
	// removed first and then added.
	moveSettle = 100 * time.Millisecond
	// moveAgain is the interval of checks while an address in use is missing.
	moveAgain = 500 * time.Millisecond
	// moveAnyway is the interval of checks without notifications.
	moveAnyway = 30 * time.Second
	// MoveAfter is how long an address in use must be missing before the node
	// uses another: a DHCP client, a flapping link or a reconfiguration
	// restores it.
	MoveAfter = 5 * time.Second
)

// UnderlayState compares the underlay in use with the host's present state.
type UnderlayState struct {
	// Now is the underlay in use, with its current name and MTU.
	Now Underlay
	// Gone is set if the link no longer exists.
	Gone bool
	// Missing are the addresses in use that the host does not have, or does not use since
	// another machine has them: Duplicate.
	Missing, Duplicate []netip.Addr
	// Elsewhere are the addresses in use that only another link has.
	Elsewhere []netip.Addr
	// PortOf is the bridge or bond that takes what arrives by the link, although the link
	// has an address in use; empty if none.
	PortOf string
	// Returned is set if the host has a former address again (Underlay.Former).
	Returned bool
}

// Unchanged reports whether the node can keep its underlay.
func (h UnderlayState) Unchanged() bool {
	return !h.Gone && len(h.Missing) == 0 && len(h.Elsewhere) == 0 && !h.Returned
}

// CheckUnderlay compares an underlay in use with the facts. It does no I/O. The link is
// identified by its index, not its name. An address is in place on that link or
// on a loopback or dummy interface.
func CheckUnderlay(f Facts, u Underlay) UnderlayState {
	h := UnderlayState{Now: u}
	l, ok := f.link(u.Index)
	h.Gone = !ok
	if ok {
		h.Now.Name, h.Now.MTU = l.Name, l.MTU
	}
	for _, a := range u.Addrs {
		on := f.bearers(a)
		if f.duplicate(a) {
			h.Missing, h.Duplicate = append(h.Missing, a), append(h.Duplicate, a)
			continue
		}
		if m, ok := f.link(l.Master); ok && m.Bridge && slices.Contains(on, u.Index) {
			h.PortOf = m.Name
		}
		inPlace := func(index int) bool {
			l, ok := f.link(index)
			return ok && (index == u.Index || l.Local)
		}
		switch {
		case len(on) == 0:
			h.Missing = append(h.Missing, a)
		case !slices.ContainsFunc(on, inPlace):
			h.Elsewhere = append(h.Elsewhere, a)
		}
	}
	h.Returned = slices.ContainsFunc(u.Former, func(a netip.Addr) bool {
		return slices.ContainsFunc(f.Addrs, func(x AddrFact) bool { return x.Prefix.Addr() == a && x.usable() })
	})
	return h
}

// Watch is the input of AwaitMove. All fields are required.
type Watch struct {
	Selector UnderlaySelector
	// At is the underlay in use, with one address of each required family.
	At Underlay
	// Context returns the input of the choice; AwaitMove sets its Held and Former
	// from At.
	Context func() UnderlayContext
	// Published returns the addresses that peers know. If they differ from
	// At's, because the store could not be updated yet, they count as former
	// addresses, which the node returns to.
	Published func() []netip.Addr
	// Fits reports whether pods can be served with an underlay MTU. If not,
	// AwaitMove does not move and waits for another MTU.
	Fits func(mtu int) bool
	// Seen is called after each check.
	Seen func(Facts, UnderlayState)
}

// AwaitMove checks the underlay after each change of a link, an address or a
// default route, and returns the underlay to use when the node must change:
//
//   - an address in use has been missing for MoveAfter, and there is another
//   - another link has the addresses in use
//   - a former address is back, and the one in use is virtual or not yet published
//   - the link's MTU has changed, and pods can be served with it
//
// As long as the link has the addresses in use, nothing else makes a node move:
// no better route, no additional address, no new name. The error is ctx's, or
// that of subscribing to notifications.
func AwaitMove(ctx context.Context, w Watch) (Underlay, error) {
	changed, stop, err := subscribeMoves(ctx)
	if err != nil {
		return Underlay{}, err
	}
	defer stop()
	var missing time.Time       // since when; zero if none is missing
	for wait := moveSettle; ; { // the first check covers changes before the subscription
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return Underlay{}, ctx.Err()
		case <-changed:
			timer.Stop()
			select {
			case <-ctx.Done():
				return Underlay{}, ctx.Err()
			case <-time.After(moveSettle):
			}
		case <-timer.C:
		}
		wait = moveAnyway
		f, err := readAddressing()
		if err != nil {
			wait = moveAgain
			continue
		}
		w := w // a copy for this check
		w.At.Former = slices.Clone(w.At.Former)
		for _, a := range w.Published() {
			if !slices.Contains(w.At.Addrs, a) && !slices.Contains(w.At.Former, a) {
				w.At.Former = append(w.At.Former, a)
			}
		}
		h := CheckUnderlay(f, w.At)
		w.Seen(f, h)
		if h.Unchanged() {
			missing = time.Time{}
			if h.Now.MTU != w.At.MTU && w.Fits(h.Now.MTU) {
				return h.Now, nil
			}
			continue
		}
		wait = moveAgain
		if !h.Gone && len(h.Missing) == 0 {
			missing = time.Time{}
		} else if missing.IsZero() {
			missing = time.Now()
		}
		if to, ok := w.choose(h, !missing.IsZero() && time.Since(missing) >= MoveAfter); ok {
			return to, nil
		}
	}
}

// choose returns another underlay, if the node may move to it. expired is set
// if something has been missing for MoveAfter.
func (w Watch) choose(h UnderlayState, expired bool) (Underlay, bool) {
	f, err := ReadFacts()
	if err != nil {
		return Underlay{}, false
	}
	k := w.Context()
	k.Held, k.Former = w.At.Addrs, w.At.Former
	for _, a := range w.At.Addrs {
		k.IPv4, k.IPv6 = k.IPv4 || a.Is4(), k.IPv6 || a.Is6()
	}
	u, err := Choose(f, w.Selector, k)
	same := slices.Equal(u.Addrs, w.At.Addrs)
	switch {
	case err != nil || !w.Fits(u.MTU):
		return u, false
	case same && u.Index == w.At.Index:
		return u, false // it is back
	case same:
		u.Why += fmt.Sprintf(": %s moved from %s", list(u.Addrs), w.At.Name)
		return u, true
	case h.Returned && len(h.Missing) == 0 && !h.Gone:
		u.Why += fmt.Sprintf(": back from %s", list(w.At.Addrs))
		return u, true
	case !expired:
		return u, false
	case !h.Gone && len(h.Missing) < len(w.At.Addrs) && u.Index != w.At.Index:
		return u, false // do not give up the family that works for one that does not
	}
	lost := "the interface " + w.At.Name
	if !h.Gone {
		lost = list(h.Missing)
	}
	u.Why += fmt.Sprintf(": moved from %s, since %s was gone for %s", list(w.At.Addrs), lost, MoveAfter)
	return u, true
}

func list(addrs []netip.Addr) string {
	var words []string
	for _, a := range addrs {
		words = append(words, a.String())
	}
	return strings.Join(words, " and ")
}

// subscribeMoves returns a channel that signals that the underlay may have
// changed, until stop is called.
func subscribeMoves(ctx context.Context) (changed <-chan struct{}, stop func(), err error) {
	socket, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return nil, nil, fmt.Errorf("subscribing to the kernel's network changes: %w", err)
	}
	// The receive timeout lets the goroutine notice that it must end.
	if err := socket.SetReceiveTimeout(&unix.Timeval{Usec: 200_000}); err != nil {
		socket.Close()
		return nil, nil, fmt.Errorf("subscribing to the kernel's network changes: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	told := make(chan struct{}, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			if hear(socket) {
				select {
				case told <- struct{}{}:
				default:
				}
			}
		}
	}()
	return told, func() {
		cancel()
		<-ended
		socket.Close()
	}, nil
}

// hear receives the pending messages and reports whether the underlay may have
// changed. After ENOBUFS any notification may have been lost.
func hear(socket *nl.NetlinkSocket) bool {
	messages, _, err := socket.Receive()
	if err != nil {
		return errors.Is(err, unix.ENOBUFS)
	}
	for _, m := range messages {
		switch m.Header.Type {
		case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
			if len(m.Data) > 1 && m.Data[1] == 0 { // struct rtmsg, rtm_dst_len
				return true
			}
		default:
			return true
		}
	}
	return false
}
