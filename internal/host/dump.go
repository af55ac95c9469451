package host

import (
	"errors"

	"github.com/vishvananda/netlink"
)

// Retry repeats a netlink dump that a concurrent change interrupted: what it
// returned may lack or repeat entries. Every dump goes through here.
func Retry[T any](dump func() (T, error)) (T, error) {
	for range 20 {
		v, err := dump()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return v, err
		}
	}
	return dump()
}
