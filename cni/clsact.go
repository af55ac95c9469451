package cni

import (
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// addClsact gives the host's end of the container's veth a clsact qdisc, to which the
// daemon attaches the programs of its short way from pod to pod, before the container
// uses it: the kernel drops what a link sends while it gets a qdisc. From Linux 6.6 on
// programs are attached without one.
func addClsact(result types.Result) error {
	var name unix.Utsname
	var major, minor int
	if err := unix.Uname(&name); err != nil {
		return err
	}
	if _, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &major, &minor); err != nil || major > 6 || major == 6 && minor >= 6 {
		return nil
	}
	r, err := types100.NewResultFromResult(result)
	if err != nil {
		return err
	}
	var errs []error
	for _, i := range r.Interfaces {
		if i.Sandbox != "" {
			continue // the container's end
		}
		l, err := netlink.LinkByName(i.Name)
		if err != nil || l.Type() != "veth" {
			continue // the bridge
		}
		err = netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
		}})
		if err != nil && !errors.Is(err, unix.EEXIST) {
			errs = append(errs, fmt.Errorf("adding the clsact qdisc to %s: %w", i.Name, err))
		}
	}
	return errors.Join(errs...)
}
