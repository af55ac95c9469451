package host

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	// moveSettle is how long changes are let gather: an address that is replaced
	// goes first and comes then.
	moveSettle = 100 * time.Millisecond
	// moveAgain is when to look again at an underlay that is not there for now.
	moveAgain = 500 * time.Millisecond
	// moveAnyway is how often to look if nothing is said.
	moveAnyway = 30 * time.Second
)

// AwaitMove looks at the underlay whenever the kernel says that a link, an
// address or a default route has changed, and returns it once the caller says
// that it differs from what it knows. An underlay that is gone for now is waited
// for. The error is ctx's, or says that the kernel's news cannot be had.
func AwaitMove(ctx context.Context, s UnderlaySelector, differs func(Underlay) bool) (Underlay, error) {
	socket, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return Underlay{}, fmt.Errorf("subscribing to the kernel's network changes: %w", err)
	}
	defer socket.Close()
	// A receive that times out lets the goroutine see that it is over.
	if err := socket.SetReceiveTimeout(&unix.Timeval{Usec: 200_000}); err != nil {
		return Underlay{}, fmt.Errorf("subscribing to the kernel's network changes: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	changed := make(chan struct{}, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			if hear(socket) {
				select {
				case changed <- struct{}{}:
				default:
				}
			}
		}
	}()
	defer func() { <-ended }()
	defer cancel()

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
		u, err := FindUnderlay(s)
		switch {
		case err != nil:
			wait = moveAgain
		case differs(u):
			return u, nil
		default:
			wait = moveAnyway
		}
	}
}

// hear receives what there is, and says whether the underlay may be another by
// it. News that the kernel had to drop may be any.
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
