package host

import (
	"errors"

	"github.com/mdlayher/netlink"
	vnetlink "github.com/vishvananda/netlink"
)

// Retry repeats a netlink dump that a concurrent change interrupted, whose
// result may lack or repeat entries.
func Retry[T any](dump func() (T, error)) (T, error) {
	for range 20 {
		v, err := dump()
		if !errors.Is(err, vnetlink.ErrDumpInterrupted) {
			return v, err
		}
	}
	return dump()
}

// executor is a netlink socket.
type executor interface {
	Execute(netlink.Message) ([]netlink.Message, error)
}

// dump requests a dump on a socket of mdlayher/netlink, which does not report by
// itself that a change interrupted one, and repeats it in that case.
func dump(c executor, request netlink.Message) ([]netlink.Message, error) {
	request.Header.Flags = netlink.Request | netlink.Dump
	return Retry(func() ([]netlink.Message, error) {
		messages, err := c.Execute(request)
		for _, m := range messages {
			if err == nil && m.Header.Flags&netlink.DumpInterrupted != 0 {
				err = vnetlink.ErrDumpInterrupted
			}
		}
		return messages, err
	})
}
