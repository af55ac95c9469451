package host

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/firewall"
	"culvert/internal/remedy"
)

// writer applies steps to the kernel.
type writer struct {
	indexes map[string]int
	failed  map[string]bool // devices that could not be created or configured
	batch   *batch          // opened for the first message
}

// write applies steps and returns the changes that were made, and all errors
// joined. Steps that need a device that failed are skipped silently: the
// device's error is returned.
func write(have reading, steps []step) ([]Change, error) {
	w := &writer{indexes: have.indexes, failed: make(map[string]bool)}
	defer func() { _ = w.batch.close() }()
	var done []Change
	var errs []error
	report := func(s step, err error) {
		switch {
		case err == nil:
			done = append(done, s.Change)
			return
		case s.caution && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EROFS) || errors.Is(err, fs.ErrPermission)):
			return // a kernel without IPv6, or missing permission in a container
		case s.Kind == KindLink:
			w.failed[s.link] = true
		}
		errs = append(errs, fmt.Errorf("%s: %w", s.Command, err))
	}
	var waiting []step
	var rules []firewall.Step
	flush := func() {
		for i, err := range w.send(waiting) {
			report(waiting[i], err)
		}
		waiting = waiting[:0]
	}
	for _, s := range steps {
		if s.message == nil || len(waiting) == batchSize {
			flush()
		}
		switch {
		case s.link != "" && w.failed[s.link]:
		case s.message != nil:
			waiting = append(waiting, s)
		case s.rules != nil:
			rules = append(rules, *s.rules)
		default:
			report(s, s.do(w))
		}
	}
	flush()
	changed, err := firewall.Apply(rules)
	for _, s := range changed {
		done = append(done, firewallChange(s))
	}
	return done, errors.Join(append(errs, err)...)
}

func (w *writer) index(name string) (int, error) {
	if i, ok := w.indexes[name]; ok {
		return i, nil
	}
	return 0, fmt.Errorf("there is no device %s", name)
}

func (w *writer) attrs(name string) (netlink.Link, error) {
	i, err := w.index(name)
	return &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Name: name, Index: i}}, err
}

func (w *writer) addLink(l Link) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = l.Name, l.MTU
	var dev netlink.Link
	switch {
	case l.VXLAN != nil:
		v := l.VXLAN
		under, err := w.index(v.Device)
		if err != nil {
			return err
		}
		attrs.HardwareAddr = v.MAC[:]
		dev = &netlink.Vxlan{
			LinkAttrs: attrs, VxlanId: int(v.VNI), VtepDevIndex: under, SrcAddr: v.Local.AsSlice(), Port: int(v.Port),
			Learning: v.Learning, GBP: v.GBP,
			UDPCSum: v.Local.Is4() && !v.NoChecksum, UDP6ZeroCSumTx: v.Local.Is6() && v.NoChecksum, UDP6ZeroCSumRx: v.Local.Is6(),
		}
	case l.IPIP != nil:
		dev = &netlink.Iptun{LinkAttrs: attrs, Local: l.IPIP.Local.AsSlice(), PMtuDisc: 1}
	case l.Veth != "":
		if other, err := netlink.LinkByName(l.Name); err == nil { // created with its other end
			w.indexes[l.Name] = other.Attrs().Index
			return nil
		}
		dev = &netlink.Veth{LinkAttrs: attrs, PeerName: l.Veth, PeerMTU: uint32(l.MTU)}
	default:
		return fmt.Errorf("the device %s is not there: %w", l.Name, fs.ErrNotExist)
	}
	err := netlink.LinkAdd(dev)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("%w: the kernel has no %s devices", err, dev.Type())
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%w: another %s device has its numbers (`ip -d link show type %s`)", err, dev.Type(), dev.Type())
	case err != nil:
		return err
	}
	made, err := netlink.LinkByName(l.Name)
	if err != nil {
		return err
	}
	w.indexes[l.Name] = made.Attrs().Index
	return nil
}

func (w *writer) deleteLink(name string) error {
	l, err := w.attrs(name)
	if err == nil {
		err = netlink.LinkDel(l)
	}
	if errors.Is(err, unix.ENODEV) {
		err = nil // already deleted
	}
	delete(w.indexes, name)
	return err
}

func (w *writer) setUp(name string) error {
	l, err := w.attrs(name)
	if err != nil {
		return err
	}
	// A socket that is being closed keeps the port a little longer.
	for end := time.Now().Add(time.Second); ; time.Sleep(20 * time.Millisecond) {
		err = netlink.LinkSetUp(l)
		if !errors.Is(err, unix.EADDRINUSE) || time.Now().After(end) {
			break
		}
	}
	if errors.Is(err, unix.EADDRINUSE) {
		return remedy.Errorf("stop the program that `ss -lunp` names", "its UDP port is taken: %w", err)
	}
	return err
}

// release detaches a device from what it is a port of.
func (w *writer) release(name string) error {
	l, err := w.attrs(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetNoMaster(l)
}

func (w *writer) setMTU(name string, mtu int) error {
	l, err := w.attrs(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetMTU(l, mtu)
}

func (w *writer) setMAC(name string, mac MAC) error {
	l, err := w.attrs(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetHardwareAddr(l, mac[:])
}

func (w *writer) setGSOMaxSegs(name string, n int) error {
	l, err := w.attrs(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetGSOMaxSegs(l, n)
}

func (w *writer) address(name string, p netip.Prefix, add bool) error {
	l, err := w.attrs(name)
	if err != nil {
		return err
	}
	a := &netlink.Addr{IPNet: IPNet(p)}
	if !add {
		return netlink.AddrDel(l, a)
	}
	if nodad(p) != "" {
		a.Flags = unix.IFA_F_NODAD
	}
	return netlink.AddrAdd(l, a)
}
