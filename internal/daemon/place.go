package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"culvert/backend/tunnel"
	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/internal/names"
	"culvert/internal/overlap"
	"culvert/internal/remedy"
	"culvert/internal/statefile"
	"culvert/subnet"
)

// place is a node's position on the underlay.
type place struct {
	underlay host.Underlay
	publics  []netip.Addr // addresses that peers send to, at most one per family
}

// placeRecord stores a place on disk, so that a restart does not move the node: the
// addresses in use, and former ones to return to.
type placeRecord struct {
	Addrs  []netip.Addr `json:"addrs"`
	Former []netip.Addr `json:"former,omitempty"`
	// StoreAddrs are the store's addresses for this node, for a start without the store.
	StoreAddrs []netip.Addr `json:"store_addrs,omitempty"`
	// Flannel are the addresses of flannel's devices that ours have replaced.
	Flannel map[string]subnet.MAC `json:"flannel,omitempty"`
}

func (d *node) placePath() string { return filepath.Join(d.options.RunDir, "underlay.json") }

// lastPlace returns the record of an earlier daemon, empty if it is missing or
// unreadable.
func (d *node) lastPlace() placeRecord {
	var r placeRecord
	text, err := statefile.Read(d.placePath(), maxRecord)
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.log.Warn("cannot read the saved underlay", "file", d.placePath(), "error", err)
	}
	return r
}

func (d *node) savePlace(u host.Underlay) {
	text, err := json.Marshal(placeRecord{Addrs: u.Addrs, Former: u.Former, StoreAddrs: d.storeAddrs, Flannel: d.flannel})
	if err == nil {
		err = statefile.Write(d.placePath(), append(text, '\n'), 0o644)
	}
	if err != nil {
		d.log.Warn("cannot save the underlay in use: a restart may choose another", "file", d.placePath(), "error", err)
	}
}

// underlayContext returns what the selection of the underlay considers at a start. config
// may be nil; the address families are then unknown.
func (d *node) underlayContext(config *subnet.Config, leased []netip.Addr) host.UnderlayContext {
	last := d.lastPlace()
	k := d.podLinks()
	k.Held, k.Former, k.Leased = last.Addrs, last.Former, leased
	if config != nil {
		for _, n := range config.Networks {
			k.IPv4, k.IPv6 = k.IPv4 || n.Prefix.Addr().Is4(), k.IPv6 || n.Prefix.Addr().Is6()
		}
	}
	return k
}

// cniDataDirs are the plugin's default data directories, one per name under which it
// is installed.
var cniDataDirs = []string{"/var/lib/cni/culvert", "/var/lib/cni/flannel"}

// podSubnets are the subnets that pods on this host may have: those leased by this
// daemon, those in subnet.env, and lost ones.
func (d *node) podSubnets() []netip.Prefix {
	all := slices.Concat(d.leasedSubnets, d.previousSubnets())
	if mark, err := d.loadFence(); err == nil && mark != nil {
		all = append(all, mark.Subnets...)
	}
	return all
}

// locate selects the place for a configuration, which is nil before it is known.
func (d *node) locate(config *subnet.Config, leased []netip.Addr) (place, error) {
	u, err := host.FindUnderlay(d.selector(), d.underlayContext(config, leased))
	if err != nil {
		return place{}, fmt.Errorf("finding the underlay interface: %w", err)
	}
	at := place{u, d.publics(u)}
	if found := fmt.Sprint(u.Name, u.Addrs, at.publics, u.MTU, u.Why); found != d.found {
		d.found = found
		d.log.Info("underlay found", "interface", u.Name, "addrs", u.Addrs, "public", at.publics, "mtu", u.MTU, "why", u.Why)
	}
	d.state.setUnderlay(u)
	return at, nil
}

// relocate is locate for a daemon that has already served: it retries until there is
// an underlay.
func (d *node) relocate(ctx context.Context) (place, error) {
	for said := ""; ; {
		at, err := d.locate(nil, nil)
		if err == nil {
			return at, nil
		}
		if err.Error() != said {
			said = err.Error()
			d.log.Error("waiting for an underlay", "error", err)
			d.state.notReady(said)
		}
		select {
		case <-ctx.Done():
			return place{}, ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

// leased returns the addresses of this node's lease in the store, for a start without
// a placeRecord. Errors are only logged: leasing follows and reports them.
func (d *node) leased(ctx context.Context, r store) []netip.Addr {
	if len(d.lastPlace().Addrs) > 0 {
		return nil
	}
	lists, ok := r.(interface {
		Entries(ctx context.Context, withExpiry bool) ([]subnet.Entry, int64, error)
	})
	if !ok {
		return nil
	}
	entries, _, err := lists.Entries(ctx, false)
	if err != nil {
		d.log.Debug("the leases cannot be read", "error", err)
		return nil
	}
	for _, e := range entries {
		if l, err := e.Lease(); err == nil && l.Node == d.options.Node && !l.Reserved {
			return l.Publics()
		}
	}
	return nil
}

// givenAddrs returns the addresses that the operator gives this node, at most one per
// family: the store's, else PublicIPs.
func (d *node) givenAddrs() []netip.Addr { return eachFamily(d.storeAddrs, d.options.PublicIPs) }

// selector returns the operator's choice of the underlay.
func (d *node) selector() host.UnderlaySelector {
	s := d.options.Underlay
	s.PublicIPs = d.givenAddrs()
	return s
}

// publics returns the addresses that peers send to: the given ones, else the
// underlay's, per family.
func (d *node) publics(u host.Underlay) []netip.Addr { return eachFamily(d.givenAddrs(), u.Addrs) }

// eachFamily returns preferred, and of others those of a family that preferred lacks.
func eachFamily(preferred, others []netip.Addr) []netip.Addr {
	all := slices.Clone(preferred)
	for _, a := range others {
		if !slices.ContainsFunc(preferred, func(p netip.Addr) bool { return p.Is4() == a.Is4() }) {
			all = append(all, a)
		}
	}
	return all
}

// askAddrs asks the store which addresses the administrator gives this node, and reports
// whether they have changed.
func (d *node) askAddrs(ctx context.Context, r store) (changed bool, err error) {
	k, ok := r.(interface {
		NodeAddrs(ctx context.Context) ([]netip.Addr, error)
	})
	if !ok {
		return false, nil
	}
	addrs, err := k.NodeAddrs(ctx)
	if err != nil || slices.Equal(addrs, d.storeAddrs) {
		return false, err
	}
	d.log.Info("this node's addresses come from the store", "addrs", addrs)
	d.storeAddrs = addrs
	return true, nil
}

// watchUnderlay watches the underlay. It returns reopen when the node must use another
// place, and reports the state of the current one meanwhile.
func (s *session) watchUnderlay(ctx context.Context) error {
	to, err := host.AwaitMove(ctx, host.Watch{
		Selector:  s.selector(),
		At:        s.at.underlay,
		Context:   s.podLinks,
		Published: func() []netip.Addr { return *s.published.Load() },
		Fits:      func(mtu int) bool { return s.fits(mtu) == nil },
		Seen:      s.recordUnderlay(),
	})
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	s.log.Warn("the underlay has changed", "interface", to.Name, "addrs", to.Addrs, "mtu", to.MTU, "before", s.at.underlay.Addrs, "why", to.Why)
	s.state.setUnderlay(to)
	s.savePlace(to)
	return reopen{place{to, s.publics(to)}}
}

// fits returns an error if the underlay's MTU is too small for the pods'.
func (s *session) fits(mtu int) error {
	u := s.at.underlay
	u.MTU = mtu
	_, err := tunnel.PodMTU(s.backend, s.lease, u)
	return err
}

// recordUnderlay returns the callback that records the underlay's state after each check.
func (s *session) recordUnderlay() func(host.Facts, host.UnderlayState) {
	name := s.at.underlay.Name
	said := make(map[api.Warning]bool)
	return func(f host.Facts, h host.UnderlayState) {
		if h.Now.Name != name {
			s.log.Warn("the underlay interface was renamed", "interface", h.Now.Name, "before", name)
			name = h.Now.Name
		}
		s.state.setUnderlay(h.Now)
		underlay := append(s.underlayWarnings(h), foreignAddresses(f)...)
		overlap := overlap.Networks(s.worked, s.lease.Subnets(), f.Networks(s.podLinks()))
		s.state.setWarnings("underlay", underlay...)
		s.state.setWarnings("overlap", overlap...)
		now := make(map[api.Warning]bool)
		for _, w := range slices.Concat(underlay, overlap) {
			if now[w] = true; !said[w] {
				s.log.Warn(w.Text, "check", w.Check, "fix", w.Fix)
			}
		}
		said = now
	}
}

// foreignAddresses warns of addresses on the userspace datapath's helper device, which
// has none of its own. On culvert's other devices foreign addresses are removed.
func foreignAddresses(f host.Facts) []api.Warning {
	var all []api.Warning
	for _, a := range f.Addrs {
		name, ok := f.LinkName(a.Link)
		if ok && a.Global && names.Ours(name) && !names.Managed(name) {
			all = append(all, api.Warning{
				Check: "foreign-address", Fix: fmt.Sprintf("ip address del %s dev %s, and have the program that added it leave culvert's devices alone", a.Prefix, name),
				Text: fmt.Sprintf("%s has the address %s, which is not culvert's: packets from it, or routed by its network, are lost", name, a.Prefix),
			})
		}
	}
	return all
}

// underlayWarnings warns of how the underlay differs from when it was selected.
func (s *session) underlayWarnings(h host.UnderlayState) []api.Warning {
	var all []api.Warning
	was := s.at.underlay
	if h.Gone {
		return append(all, api.Warning{
			Check: "underlay-gone", Fix: "restore it, or name another with --iface",
			Text: fmt.Sprintf("the underlay interface %s no longer exists: no tunnel packet can be sent", was.Name),
		})
	}
	if h.PortOf != "" {
		all = append(all, api.Warning{
			Check: "underlay-port", Fix: fmt.Sprintf("move the addresses of %s to %s", h.Now.Name, h.PortOf),
			Text: fmt.Sprintf("%s is a port of %s, which takes what arrives, but the underlay's addresses are on %s: packets of peers are lost", h.Now.Name, h.PortOf, h.Now.Name),
		})
	}
	for _, a := range h.Duplicate {
		all = append(all, api.Warning{
			Check: "duplicate-address", Fix: "give one of the two machines another address",
			Text: fmt.Sprintf("another machine on the link has %s, so this host does not use it (duplicate address detection failed); after %s the node uses another, if there is one", a, host.MoveAfter),
		})
	}
	for _, a := range h.Missing {
		if slices.Contains(h.Duplicate, a) {
			continue
		}
		all = append(all, api.Warning{
			Check: "underlay-address-gone", Fix: fmt.Sprintf("ip address add %s/... dev %s", a, h.Now.Name),
			Text: fmt.Sprintf("this host no longer has the address %s, to which its peers send; after %s the node uses another, if there is one", a, host.MoveAfter),
		})
	}
	for _, a := range h.Elsewhere {
		all = append(all, api.Warning{
			Check: "underlay-address-gone", Fix: "name the interface that has it with --iface",
			Text: fmt.Sprintf("%s, to which peers send, is no longer on %s, and the interface that has it cannot be the underlay", a, h.Now.Name),
		})
	}
	if err := s.fits(h.Now.MTU); err != nil {
		what, do := remedy.Split(err)
		if s.fits(was.MTU) == nil {
			do = fmt.Sprintf("ip link set %s mtu %d", h.Now.Name, was.MTU)
		}
		all = append(all, api.Warning{
			Check: "underlay-mtu", Fix: do,
			Text: what + "; running pods keep their MTU, and their larger packets are lost",
		})
	}
	return all
}
