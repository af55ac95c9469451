package host

import (
	"errors"

	"github.com/vishvananda/netlink"
)

// Retry repeats a netlink dump that a concurrent change interrupted, whose
// result may lack or repeat entries.
func Retry[T any](dump func() (T, error)) (T, error) {
	for range 20 {
		v, err := dump()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return v, err
		}
	}
	return dump()
}
