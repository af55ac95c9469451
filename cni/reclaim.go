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

// With a runtime that never calls GC and forgets containers, a subnet fills up. So
// when an ADD finds no free address, it releases what is certainly unused and
// retries once:
//
//   - attachments of an earlier boot: containers do not survive a reboot
//   - attachments whose network namespace is gone
//
// A record has its boot ID and namespace. A host-local reservation without a record
// is of an earlier boot if it is older than this boot, since every ADD of this plugin
// saves a record first. File times depend on the wall clock, which may have been
// wrong, so the address must not be in the neighbour table either.

// leftover reports whether the attachment of r is gone: it is of another boot, or
// its namespace is not live.
func (r record) leftover(boot string, live map[string]bool) bool {
	switch {
	case boot == "" || r.Boot == "":
		return false
	case r.Boot != boot:
		return true
	}
	return r.Netns != "" && r.NetnsPath != "" && r.netns() == "" && !live[r.Netns]
}

// reclaimed is the result of reclaim.
type reclaimed struct {
	released int
	held     int // reservations kept
	unknown  int // those of held whose container has no record
	dir      string
}

func (r reclaimed) String() string {
	s := fmt.Sprintf("%d addresses are reserved in %s", r.held, r.dir)
	if r.unknown > 0 {
		s += fmt.Sprintf(", %d of them by containers that this plugin has no record of (a GC by the runtime releases unused ones)", r.unknown)
	}
	return s
}

// reclaim releases what is certainly unused.
func (n NetConf) reclaim(ctx context.Context, s state) (reclaimed, error) {
	var sum reclaimed
	// Skip recent records: other ADDs are in progress.
	records, err := s.records(n.Name, time.Now().Add(-time.Minute))
	if err != nil {
		return sum, err
	}
	boot, live := bootID(), liveNamespaces()
	for _, r := range records {
		if !r.leftover(boot, live) {
			continue
		}
		released, err := s.releaseIf(ctx, r.Attachment, func(r record) bool { return r.leftover(boot, live) })
		if err != nil {
			fmt.Fprintf(os.Stderr, "culvert-cni: releasing container %s, which no longer exists: %v\n", r.ContainerID, err)
			continue
		}
		if !released {
			continue // an ADD of it is in progress, or has replaced it
		}
		sum.released++
		fmt.Fprintf(os.Stderr, "culvert-cni: released container %s, interface %s: it is of an earlier boot or its network namespace is gone\n", r.ContainerID, r.IfName)
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
		fmt.Fprintf(os.Stderr, "culvert-cni: released address %s of container %q, left by an earlier boot\n", r.Addr, r.Owner.ContainerID)
	}
	return sum, err
}

// containers returns the containers that have a record, even a damaged one.
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

// releaseEarlierBoot releases the reservations that are older than this boot and of
// no container in here. It calls kept for the others.
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

// neighbours returns the addresses for which the neighbour table has a link-layer
// address.
func neighbours() map[netip.Addr]bool {
	all := make(map[netip.Addr]bool)
	list, err := retryDump(func() ([]netlink.Neigh, error) { return netlink.NeighList(0, netlink.FAMILY_ALL) })
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

// liveNamespaces returns the network namespaces of processes and mounts, as
// netnsIdentity identifies them.
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
