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
	// moveSettle is how long changes are let gather: an address that is replaced
	// goes first and comes then.
	moveSettle = 100 * time.Millisecond
	// moveAgain is when to look again while an address in use is not there.
	moveAgain = 500 * time.Millisecond
	// moveAnyway is how often to look if nothing is said.
	moveAnyway = 30 * time.Second
	// MoveAfter is how long an address in use must have been gone before a node
	// takes another: a DHCP client, a link that flaps or a program that sets up
	// the interface anew brings it back.
	MoveAfter = 5 * time.Second
)

// Holding is how the underlay in use stands.
type Holding struct {
	// Now is the underlay in use with its present name and MTU.
	Now Underlay
	// Gone says that the link is not there any more.
	Gone bool
	// Missing are the addresses in use that the host does not bear.
	Missing []netip.Addr
	// Elsewhere are those that only another link bears.
	Elsewhere []netip.Addr
	// Returned says that the host bears a former address again (Underlay.Former).
	Returned bool
}

// Holds says whether the node can stay as it is.
func (h Holding) Holds() bool {
	return !h.Gone && len(h.Missing) == 0 && len(h.Elsewhere) == 0 && !h.Returned
}

// Hold compares, purely, an underlay in use with the facts. A link is followed
// by its index, whatever its name; an address is in its place on that link, or on
// an interface that bears addresses for the whole host.
func Hold(f Facts, u Underlay) Holding {
	h := Holding{Now: u}
	l, ok := f.link(u.Index)
	h.Gone = !ok
	if ok {
		h.Now.Name, h.Now.MTU = l.Name, l.MTU
	}
	for _, a := range u.Addrs {
		on := f.bearers(a)
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

// Watch is what AwaitMove is told. All fields are required.
type Watch struct {
	Selector UnderlaySelector
	// At is the underlay in use, with one address of each family that is needed.
	At Underlay
	// Known returns what a choice goes by; its Held and Former are set from At.
	Known func() Known
	// Published returns the addresses that peers know of. Where they are not At's,
	// since the store could not be told yet, the node goes back to them as to
	// former ones.
	Published func() []netip.Addr
	// Fits says whether pods can be served with an MTU of the underlay. A link
	// whose MTU is too small is waited for.
	Fits func(mtu int) bool
	// Seen is called after each look.
	Seen func(Facts, Holding)
}

// AwaitMove looks at the underlay whenever the kernel says that a link, an
// address or a default route has changed, and returns it when the node must
// change:
//
//   - an address in use has been gone for MoveAfter, and there is another
//   - another link bears the addresses in use
//   - a former address is there again, in place of a virtual one or of one that
//     is not published yet
//   - the link has another MTU, and pods can be served with it
//
// As long as the host bears the addresses on that link, nothing else moves a
// node: no better route, no further address, no other name. The error is ctx's,
// or says that the kernel's notifications cannot be had.
func AwaitMove(ctx context.Context, w Watch) (Underlay, error) {
	changed, stop, err := subscribeMoves(ctx)
	if err != nil {
		return Underlay{}, err
	}
	defer stop()
	var missing time.Time       // since when; zero if nothing is
	for wait := moveSettle; ; { // the first look is for what changed before
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return Underlay{}, ctx.Err()
		case <-changed:
			timer.Stop()
			time.Sleep(moveSettle)
		case <-timer.C:
		}
		wait = moveAnyway
		f, err := readAddressing()
		if err != nil {
			wait = moveAgain
			continue
		}
		w := w // as of this look
		w.At.Former = slices.Clone(w.At.Former)
		for _, a := range w.Published() {
			if !slices.Contains(w.At.Addrs, a) && !slices.Contains(w.At.Former, a) {
				w.At.Former = append(w.At.Former, a)
			}
		}
		h := Hold(f, w.At)
		w.Seen(f, h)
		if h.Holds() {
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

// choose chooses another underlay, if the node may move to it. Expired says that
// what is missing has been so for MoveAfter.
func (w Watch) choose(h Holding, expired bool) (Underlay, bool) {
	f, err := ReadFacts()
	if err != nil {
		return Underlay{}, false
	}
	k := w.Known()
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
		return u, false // it is there again
	case same:
		u.Why += fmt.Sprintf(": %s moved from %s", list(u.Addrs), w.At.Name)
		return u, true
	case h.Returned && len(h.Missing) == 0 && !h.Gone:
		u.Why += fmt.Sprintf(": back from %s", list(w.At.Addrs))
		return u, true
	case !expired:
		return u, false
	case !h.Gone && len(h.Missing) < len(w.At.Addrs) && u.Index != w.At.Index:
		return u, false // a family that works is not given up for one that does not
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

// subscribeMoves returns a channel that says that the underlay may have changed,
// until stop is called.
func subscribeMoves(ctx context.Context) (changed <-chan struct{}, stop func(), err error) {
	socket, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return nil, nil, fmt.Errorf("subscribing to the kernel's network changes: %w", err)
	}
	// A receive that times out lets the goroutine see that it is over.
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

// hear receives what there is, and says whether the underlay may have changed.
// After ENOBUFS any notification may have been lost.
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
