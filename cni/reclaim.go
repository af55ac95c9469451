package cni

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A runtime that never calls GC, and forgets containers, lets a subnet run full.
// So an ADD for which no address is left releases what is known to be nobody's,
// once, and tries again:
//
//   - what an earlier boot left: no container outlives its machine's boot
//   - what a container had whose network namespace has gone
//
// A record says of which boot it is, and of which namespace. A reservation of
// host-local's without a record is of an earlier boot if it was written before
// this one, since every ADD of this plugin leaves a record first; that is by the
// wall clock, which may have been wrong, so nobody may have been heard under that
// address either.

// leftover says whether what r is about is gone, by the boot or, if it is of this
// one, by the namespace.
func (r record) leftover(boot string, live map[string]bool) bool {
	switch {
	case boot == "" || r.Boot == "":
		return false
	case r.Boot != boot:
		return true
	}
	return r.Netns != "" && r.NetnsPath != "" && r.netns() == "" && !live[r.Netns]
}

// reclaimed is what could be released, and what not.
type reclaimed struct {
	released int
	held     int // reservations that stay
	unknown  int // of held, those of no container that is recorded
	dir      string
}

func (r reclaimed) String() string {
	s := fmt.Sprintf("%d addresses are reserved in %s", r.held, r.dir)
	if r.unknown > 0 {
		s += fmt.Sprintf(", %d of them by containers that this plugin has no record of (a GC by the runtime releases what is nobody's)", r.unknown)
	}
	return s
}

// reclaim releases what is known to be nobody's.
func (n NetConf) reclaim(ctx context.Context, s state) (reclaimed, error) {
	var sum reclaimed
	// Other ADDs are on their way: what is young is theirs.
	records, err := s.records(n.Name, time.Now().Add(-time.Minute))
	if err != nil {
		return sum, err
	}
	boot, live := bootID(), liveNamespaces()
	for _, r := range records {
		if !r.leftover(boot, live) {
			continue
		}
		err := delegate(ctx, "DEL", r.Attachment, r.Delegate, "")
		if err == nil {
			err = s.forget(r.Attachment)
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "culvert-cni: releasing container %s, which is gone: %v\n", r.ContainerID, err)
			continue
		}
		sum.released++
		fmt.Fprintf(os.Stderr, "culvert-cni: released container %s, interface %s: its boot or its network namespace has gone\n", r.ContainerID, r.IfName)
	}
	here, err := s.containers()
	if err != nil {
		return sum, err
	}
	store, ok, err := n.addressStore()
	if err != nil || !ok {
		return sum, err
	}
	sum.dir = store.dir
	gone, err := store.releaseEarlierBoot(here, func(r reservation) {
		sum.held++
		if !here[r.Owner.ContainerID] {
			sum.unknown++
		}
	})
	for _, r := range gone {
		sum.released++
		fmt.Fprintf(os.Stderr, "culvert-cni: released address %s of container %q: an earlier boot left it\n", r.Addr, r.Owner.ContainerID)
	}
	return sum, err
}

// containers are those that have a record, whatever is in it.
func (s state) containers() (map[string]bool, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, ioFailure("reading state", err)
	}
	all := make(map[string]bool, len(entries))
	for _, e := range entries {
		id, _, _ := strings.Cut(e.Name(), ":")
		all[id] = true
	}
	return all, nil
}

// releaseEarlierBoot releases the reservations that were written before this boot
// and are of no container in here. It tells of those that it keeps.
func (s addressStore) releaseEarlierBoot(here map[string]bool, kept func(reservation)) ([]reservation, error) {
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return nil, err
	}
	booted := time.Now().Add(-time.Duration(up.Nano()))
	heard := neighbours()
	return s.release(time.Now(), func(r reservation) bool {
		info, err := os.Stat(filepath.Join(s.dir, r.Addr.String()))
		doomed := err == nil && info.ModTime().Before(booted) && !here[r.Owner.ContainerID] && !heard[r.Addr]
		if !doomed && kept != nil {
			kept(r)
		}
		return doomed
	})
}

// neighbours are the addresses under which somebody was heard.
func neighbours() map[netip.Addr]bool {
	all := make(map[netip.Addr]bool)
	list, err := complete(func() ([]netlink.Neigh, error) { return netlink.NeighList(0, netlink.FAMILY_ALL) })
	if err != nil {
		return all
	}
	for _, e := range list {
		const heard = netlink.NUD_REACHABLE | netlink.NUD_STALE | netlink.NUD_DELAY | netlink.NUD_PROBE | netlink.NUD_PERMANENT
		if a, ok := netip.AddrFromSlice(e.IP); ok && e.State&heard != 0 {
			all[a.Unmap()] = true
		}
	}
	return all
}

// liveNamespaces are the network namespaces that a process is in, or that are
// mounted, as netnsIdentity has them.
func liveNamespaces() map[string]bool {
	live := make(map[string]bool)
	paths, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	for _, p := range paths {
		if id := netnsIdentity(p); id != "" {
			live[id] = true
		}
	}
	text, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line) // see proc_pid_mountinfo(5)
		if len(fields) > 4 && strings.HasPrefix(fields[3], "net:[") {
			if id := netnsIdentity(fields[4]); id != "" {
				live[id] = true
			}
		}
	}
	return live
}
