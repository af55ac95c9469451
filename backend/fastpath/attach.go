package fastpath

import (
	"errors"
	"fmt"
	"maps"

	"github.com/cilium/ebpf"
	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/host"
	"culvert/internal/names"
)

// fill updates the maps to the desired contents, by the difference to the last ones.
// Only this Path writes them, except for what the programs count.
func (p *Path) fill(want contents) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var err error
	if p.unsure {
		err = errors.Join(
			prune(p.loaded.Maps["sent"], want.counted),
			prune(p.loaded.Maps["peers"], want.peers),
			prune(p.loaded.Maps["sources"], want.sources),
			prune(p.loaded.Maps["tunnels"], want.tunnels),
		)
	}
	err = errors.Join(err,
		fillKeys(p.loaded.Maps["sent"], p.held.counted, want.counted),
		fillMap(p.loaded.Maps["peers"], p.held.peers, want.peers),
		fillKeys(p.loaded.Maps["sources"], p.held.sources, want.sources),
		fillMap(p.loaded.Maps["tunnels"], p.held.tunnels, want.tunnels),
	)
	if p.unsure = err != nil; p.unsure {
		p.held = contents{} // write everything next time
		return fmt.Errorf("filling the fast path's maps: %w", err)
	}
	p.held = want
	return nil
}

func fillMap[K, V comparable](m *ebpf.Map, have, want map[K]V) error {
	if err := deleteUnwanted(m, have, want); err != nil {
		return err
	}
	for key, value := range want {
		if old, there := have[key]; there && old == value {
			continue
		}
		if err := m.Put(&key, &value); err != nil {
			return err
		}
	}
	return nil
}

func deleteUnwanted[K comparable, V any](m *ebpf.Map, have, want map[K]V) error {
	for key := range have {
		if _, stays := want[key]; !stays {
			if err := m.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return err
			}
		}
	}
	return nil
}

// prune deletes what is in a map, by whatever call it came there, and not wanted.
func prune[K comparable, V any](m *ebpf.Map, want map[K]V) error {
	there := make(map[K]V)
	var key K
	err := m.NextKey(nil, &key)
	for ; err == nil; err = m.NextKey(&key, &key) {
		there[key] = *new(V)
	}
	if !errors.Is(err, ebpf.ErrKeyNotExist) { // there are no more
		return err
	}
	return deleteUnwanted(m, there, want)
}

// fillKeys is fillMap for a map of counters, which begin at zero.
func fillKeys[K comparable, V any](m *ebpf.Map, have, want map[K]V) error {
	if err := deleteUnwanted(m, have, want); err != nil {
		return err
	}
	zero := make([]traffic, ebpf.MustPossibleCPU())
	for key := range want {
		if _, there := have[key]; there {
			continue
		}
		if err := m.Update(&key, zero, ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return err
		}
	}
	return nil
}

// occupied means that another program's filter has our priority.
type occupied struct{ link, by string }

func (o *occupied) Error() string {
	return fmt.Sprintf("the tc filter %q of another program has priority %d on %s", o.by, names.FilterPriority, o.link)
}

// attach attaches each program that is not in place. A filter of an earlier daemon is
// replaced atomically.
func (p *Path) attach(hooks []hook) ([]host.Change, error) {
	var changes []host.Change
	for _, h := range hooks {
		if h.program == programJoin {
			if err := prepareJoin(); err != nil {
				return changes, err
			}
		}
		at := netlink.FilterAttrs{
			LinkIndex: h.index, Parent: h.parent, Handle: 1, Priority: names.FilterPriority, Protocol: unix.ETH_P_ALL,
		}
		link := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Name: h.link, Index: h.index}}
		there, err := p.stands(link, h)
		if err != nil {
			return changes, err
		}
		if there {
			continue
		}
		if err := host.AddClsact(link); err != nil {
			return changes, err
		}
		if err := netlink.FilterReplace(&netlink.BpfFilter{
			FilterAttrs: at, Fd: p.loaded.Programs[h.program].FD(), Name: h.program, DirectAction: true,
		}); err != nil {
			return changes, fmt.Errorf("attaching %s to %s: %w", h.program, h.link, err)
		}
		changes = append(changes, host.Change{Kind: host.KindFastPath, Command: fmt.Sprintf(
			"tc filter replace dev %s %s pref %d handle 1 bpf direct-action # %s", h.link, host.Direction(h.parent), names.FilterPriority, h.program)})
	}
	return changes, nil
}

// stands reports whether our program is attached at its hook. The error is occupied if
// another program's filter is.
func (p *Path) stands(l netlink.Link, h hook) (bool, error) {
	filters, err := host.Retry(func() ([]netlink.Filter, error) { return netlink.FilterList(l, h.parent) })
	if err != nil {
		return false, nil // no qdisc yet
	}
	for _, f := range filters {
		if f.Attrs().Priority != names.FilterPriority {
			continue
		}
		b, ok := f.(*netlink.BpfFilter)
		if !ok || !host.OurFilter(f) {
			name := f.Type()
			if ok {
				name = b.Name
			}
			return false, &occupied{h.link, name}
		}
		if b.Handle == 1 && ebpf.ProgramID(b.Id) == p.ids[h.program] {
			return true, nil
		}
	}
	return false, nil
}

// stepBack removes our filters, the senders first.
func (p *Path) stepBack() ([]host.Change, error) {
	filters, err := host.Filters()
	if err != nil {
		return nil, err
	}
	var changes []host.Change
	var errs []error
	for _, f := range filters {
		err := host.RemoveFilter(f)
		if err == nil {
			changes = append(changes, host.Change{Kind: host.KindFastPath, Command: f.DeleteCommand()})
		}
		errs = append(errs, err)
	}
	return changes, errors.Join(errs...)
}

// prepareJoin enables GRO on the far end of the veth pair and disables TSO on the near
// end: veth runs GRO only for packets from an end without TSO
// (veth_skb_is_eligible_for_gro in drivers/net/veth.c).
func prepareJoin() error {
	tool, err := ethtool.NewEthtool()
	if err != nil {
		return fmt.Errorf("asking for the features of %s: %w", names.JoinNear, err)
	}
	defer tool.Close()
	far := map[string]bool{"rx-gro": true}
	near := map[string]bool{
		"tx-tcp-segmentation": false, "tx-tcp6-segmentation": false, "tx-tcp-ecn-segmentation": false, "tx-tcp-mangleid-segmentation": false,
		"tx-tcp-accecn-segmentation": false,
	}
	for name, want := range map[string]map[string]bool{names.JoinFar: far, names.JoinNear: near} {
		have, err := tool.Features(name)
		if err != nil {
			return fmt.Errorf("asking for the features of %s: %w", name, err)
		}
		maps.DeleteFunc(want, func(feature string, on bool) bool {
			now, known := have[feature]
			return !known || now == on
		})
		if len(want) == 0 {
			continue
		}
		if err := tool.Change(name, want); err != nil {
			return fmt.Errorf("setting the features of %s: %w", name, err)
		}
	}
	return nil
}
