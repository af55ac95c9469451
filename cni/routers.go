package cni

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"

	"github.com/vishvananda/netns"
)

// acceptRA is the setting that a new interface takes its own from.
const acceptRA = "/proc/sys/net/ipv6/conf/default/accept_ra"

// refuseRouters has interfaces that are made in the container's namespace take no
// router advertisements, until done is called. What a pod on the bridge gets comes
// from host-local alone; without this any other pod could make itself its IPv6
// router, in an IPv4 cluster too (CVE-2020-10749, whose remedy in the bridge plugin
// is for the host's end).
//
// It is said before the interface is there, since it listens at once.
func (n NetConf) refuseRouters(path string) (done func(), err error) {
	done = func() {}
	if bridge, err := n.bridgeName(); err != nil || bridge == "" {
		return done, err // who else sees to the addresses may want them
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
		return done, fmt.Errorf("the pod goes on taking IPv6 router advertisements of others: %w", err)
	}
	if before == "" {
		return done, nil
	}
	return func() { _ = swap(before) }, nil
}

// inNamespace calls f on a thread that is in a network namespace.
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
