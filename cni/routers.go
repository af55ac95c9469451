package cni

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"

	"github.com/vishvananda/netns"
)

// acceptRA is the default of the setting for new interfaces.
const acceptRA = "/proc/sys/net/ipv6/conf/default/accept_ra"

// refuseRouters makes interfaces that are created in the container's namespace ignore
// router advertisements, until done is called. A pod on the bridge gets its addresses and
// routes from host-local only; otherwise any other pod could make itself the IPv6 router,
// also in an IPv4 cluster (CVE-2020-10749, for which the bridge plugin fixes only the
// host's end).
//
// The setting must be made before the interface exists, since the interface accepts
// advertisements at once.
func (n NetConf) refuseRouters(path string) (done func(), err error) {
	done = func() {}
	if bridge, err := n.bridgeName(); err != nil || bridge == "" {
		return done, err // another IPAM plugin may rely on them
	}
	before := ""
	swap := func(value string) error {
		return inNamespace(path, func() error {
			b, err := os.ReadFile(acceptRA)
			if errors.Is(err, fs.ErrNotExist) {
				return nil // no IPv6
			}
			if err != nil {
				return err
			}
			before = string(b)
			return os.WriteFile(acceptRA, []byte(value), 0)
		})
	}
	if err := swap("0"); err != nil {
		return done, fmt.Errorf("the pod still accepts other pods' IPv6 router advertisements: %w", err)
	}
	if before == "" {
		return done, nil
	}
	return func() { _ = swap(before) }, nil
}

// inNamespace calls f on a thread in the network namespace at path.
func inNamespace(path string, f func() error) error {
	result := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		h, err := netns.GetFromPath(path)
		if err == nil {
			defer func() { _ = h.Close() }()
			err = netns.Set(h)
		}
		if err == nil {
			err = f()
		}
		result <- err
	}()
	return <-result
}
