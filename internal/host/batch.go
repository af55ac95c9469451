package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/names"
)

// batchSize is the number of messages sent to the kernel in one call. Their
// acknowledgements must fit in the socket's receive buffer.
const batchSize = 100

// batch is a route netlink socket that sends many messages in one call.
type batch struct{ conn *netlink.Conn }

func (b *batch) close() error {
	if b == nil {
		return nil
	}
	return b.conn.Close()
}

// send writes the steps' messages in one call and returns the kernel's answer
// to each.
func (w *writer) send(steps []step) []error {
	if len(steps) == 0 {
		return nil
	}
	errs := make([]error, len(steps))
	fail := func(err error) []error {
		for i := range errs {
			errs[i] = errors.Join(errs[i], err)
		}
		return errs
	}
	if w.batch == nil {
		c, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
		if err != nil {
			return fail(err)
		}
		w.batch = &batch{c}
		// Without this option, an error acknowledgement repeats the request.
		_ = c.SetOption(netlink.CapAcknowledge, true)
	}
	var messages []netlink.Message
	var sent []int
	for i, s := range steps {
		m, err := s.message(w)
		if err != nil {
			errs[i] = err
			continue
		}
		m.Header.Flags |= netlink.Request | netlink.Acknowledge
		messages = append(messages, m)
		sent = append(sent, i)
	}
	if len(messages) == 0 {
		return errs
	}
	if _, err := w.batch.conn.SendMessages(messages); err != nil {
		return fail(err)
	}
	for k, i := range sent {
		// The kernel answers in order, one datagram per message.
		_, err := w.batch.conn.Receive()
		if messages[k].Header.Flags&netlink.Create == 0 && (errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT)) {
			err = nil // a deletion of something that is already gone
		}
		errs[i] = err
	}
	return errs
}

// routeMessage builds a struct rtmsg and its attributes, see rtnetlink(7).
func (w *writer) routeMessage(r Route, add bool) (netlink.Message, error) {
	m := netlink.Message{Header: netlink.Header{Type: unix.RTM_DELROUTE}}
	if add {
		m.Header = netlink.Header{Type: unix.RTM_NEWROUTE, Flags: netlink.Create}
	}
	scope, kind, flags := unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST, 0
	switch {
	case r.Link == "":
		kind = unix.RTN_UNREACHABLE
	case !r.Via.IsValid() && r.To.Addr().Is4():
		scope = unix.RT_SCOPE_LINK
	}
	if r.OnLink {
		flags = unix.RTNH_F_ONLINK
	}
	head := make([]byte, unix.SizeofRtMsg)
	head[0], head[1] = familyOf(r.To.Addr()), byte(r.To.Bits())
	head[4], head[5], head[6], head[7] = unix.RT_TABLE_MAIN, names.RouteProtocol, byte(scope), byte(kind)
	binary.NativeEndian.PutUint32(head[8:], uint32(flags))
	e := netlink.NewAttributeEncoder()
	e.Bytes(unix.RTA_DST, r.To.Addr().AsSlice())
	if r.Link != "" {
		index, err := w.index(r.Link)
		if err != nil {
			return m, err
		}
		e.Uint32(unix.RTA_OIF, uint32(index))
	}
	if r.Via.IsValid() {
		e.Bytes(unix.RTA_GATEWAY, r.Via.AsSlice())
	}
	if r.Source.IsValid() {
		e.Bytes(unix.RTA_PREFSRC, r.Source.AsSlice())
	}
	if r.Metric != 0 {
		e.Uint32(unix.RTA_PRIORITY, uint32(r.Metric))
	}
	return finish(m, head, e)
}

// fdbMessage builds a struct ndmsg of the bridge family.
func (w *writer) fdbMessage(f FDBEntry, add bool) (netlink.Message, error) {
	return w.neighbour(unix.AF_BRIDGE, unix.NTF_SELF, f.Link, f.To, f.MAC, add)
}

func (w *writer) neighbourMessage(n Neighbour, add bool) (netlink.Message, error) {
	return w.neighbour(familyOf(n.IP), 0, n.Link, n.IP, n.MAC, add)
}

func (w *writer) neighbour(family byte, flags byte, link string, ip netip.Addr, mac MAC, add bool) (netlink.Message, error) {
	m := netlink.Message{Header: netlink.Header{Type: unix.RTM_DELNEIGH}}
	if add {
		m.Header = netlink.Header{Type: unix.RTM_NEWNEIGH, Flags: netlink.Create | netlink.Replace}
	}
	index, err := w.index(link)
	if err != nil {
		return m, err
	}
	head := make([]byte, unix.SizeofNdMsg)
	head[0] = family
	binary.NativeEndian.PutUint32(head[4:], uint32(index))
	binary.NativeEndian.PutUint16(head[8:], unix.NUD_PERMANENT)
	head[10] = flags
	e := netlink.NewAttributeEncoder()
	e.Bytes(unix.NDA_DST, ip.AsSlice())
	e.Bytes(unix.NDA_LLADDR, mac[:])
	return finish(m, head, e)
}

func finish(m netlink.Message, head []byte, e *netlink.AttributeEncoder) (netlink.Message, error) {
	attrs, err := e.Encode()
	if err != nil {
		return m, fmt.Errorf("encoding attributes: %w", err)
	}
	m.Data = append(head, attrs...)
	return m, nil
}

func familyOf(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
