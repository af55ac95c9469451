package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"culvert/internal/boottime"
)

// Problem is something on this host that keeps pods from being added, or would.
type Problem struct {
	Check string `json:"check"` // its id in culvert's list of checks
	Text  string `json:"text"`
	Fix   string `json:"fix,omitempty"`
	// Mends says that the next ADD repairs it, and that Install.Mend repairs it now.
	Mends bool `json:"mends,omitempty"`
}

// examine returns what would keep an ADD from succeeding, whether a daemon runs or not.
func (n NetConf) examine() []Problem {
	var problems []Problem
	add := func(check string, mends bool, fix, format string, args ...any) {
		problems = append(problems, Problem{Check: check, Text: fmt.Sprintf(format, args...), Fix: fix, Mends: mends})
	}
	env, err := ReadSubnetEnv(n.SubnetFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return problems // the daemon reports this
	case err != nil:
		add("subnet-file", false, "start the daemon, which writes it anew", "%v", err)
		return problems
	}
	if now, err := boottime.Now(); err == nil {
		switch expired, disputed := env.Expired(now); {
		case expired && env.Boot == "":
			add("subnet-file", false, "start the daemon, which rewrites it; check that the clock is right",
				"%s says that the lease ended at %s, and the clock says %s: no pod is added", n.SubnetFile, stamp(env.Expires), stamp(now.Wall))
		case expired:
			add("subnet-file", false, "start the daemon, which renews the lease", "the lease in %s expired at %s: no pod is added", n.SubnetFile, stamp(env.Expires))
		case disputed:
			add("clock", false, "start the daemon, which rewrites the lease's expiry by the new clock",
				"the clock was set since %s was written: it says %s, the lease ends at %s by the old one", n.SubnetFile, stamp(now.Wall), stamp(env.Expires))
		}
	}
	if b, err := n.findUnusableBridge(env); err == nil && b != nil {
		add("cni-bridge", b.repairable(), b.fix(), "%s", b.describe())
	}
	if sum, capacity, releasable, err := n.addresses(env); err == nil && capacity > 0 && sum.held >= capacity {
		if releasable > 0 {
			add("cni-addresses", true, "the next ADD releases them", "%s, which are all that the subnet has; an earlier boot left %d of them", sum, releasable)
		} else {
			add("cni-addresses", false, "delete pods, or have the runtime call GC", "%s, which are all that the subnet has", sum)
		}
	}
	return problems
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// describe says why the delegate cannot add a pod to the bridge.
func (b *unusableBridge) describe() string {
	if b.foreign != "" {
		return fmt.Sprintf("%s %s: pods cannot be attached to it", b.name, b.foreign)
	}
	var what []string
	for _, a := range b.address {
		what = append(what, fmt.Sprintf("has the address %s, so that it cannot get this node's gateway %s", a.IPNet, b.gateway))
	}
	if b.noMAC {
		what = append(what, "has no Ethernet address")
	}
	if b.noIPv6 {
		what = append(what, "has IPv6 disabled (disable_ipv6)")
	}
	return fmt.Sprintf("the bridge %s %s; %d interfaces are on it", b.name, strings.Join(what, ", and "), b.ports)
}

// fix returns what an administrator can do about it.
func (b *unusableBridge) fix() string {
	if b.foreign != "" {
		return b.replace()
	}
	if !b.repairable() {
		return "delete the pods of the old subnet (drain the node): after the last one the plugin corrects the bridge itself"
	}
	var all []string
	for _, a := range b.address {
		all = append(all, fmt.Sprintf("ip address del %s dev %s", a.IPNet, b.name))
	}
	if b.noIPv6 {
		all = append(all, "sysctl -w net.ipv6.conf."+b.name+".disable_ipv6=0")
	}
	if b.noMAC {
		all = append(all, fmt.Sprintf("ip link set %s address 02:...", b.name))
	}
	return strings.Join(all, "; ") + " (the next ADD does it by itself)"
}

// addresses counts host-local's reservations in the subnet, how many addresses
// it has for pods, and how many an ADD would release.
func (n NetConf) addresses(env SubnetEnv) (sum reclaimed, capacity, releasable int, err error) {
	store, ok, err := n.addressStore()
	if err != nil || !ok {
		return sum, 0, 0, err
	}
	sum.dir = store.dir
	for _, s := range env.Subnets() {
		if s.Addr().Is4() && s.Bits() <= 30 {
			capacity = 1<<(32-s.Bits()) - 3 // network, gateway, broadcast
		}
	}
	here, err := state{dir: n.DataDir}.containers()
	if err != nil { // no pod was ever added
		here = map[string]bool{}
	}
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return sum, 0, 0, err
	}
	booted, heard := time.Now().Add(-time.Duration(up.Nano())), neighbours()
	entries, err := os.ReadDir(store.dir)
	if err != nil {
		return sum, 0, 0, err
	}
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(store.dir, e.Name()))
		if err != nil {
			continue
		}
		r, ok := parseReservation(e.Name(), text)
		if !ok || !r.Addr.Is4() {
			continue
		}
		sum.held++
		if !here[r.Owner.ContainerID] {
			sum.unknown++
			if info, err := e.Info(); err == nil && info.ModTime().Before(booted) && !heard[r.Addr] {
				releasable++
			}
		}
	}
	return sum, capacity, releasable, nil
}

// Mend repairs what the next ADD would repair of what examine finds: it corrects the
// pods' bridge, and releases addresses that an earlier boot left.
func (i Install) Mend(ctx context.Context) (done []string, err error) {
	n, _, err := readConflist(filepath.Join(i.ConfDir, i.ConfName))
	if err != nil {
		return nil, err
	}
	env, err := ReadSubnetEnv(n.SubnetFile)
	if err != nil {
		return nil, err
	}
	b, err := n.findUnusableBridge(env)
	if err == nil && b != nil && b.repairable() {
		if err = b.repair(); err == nil {
			done = append(done, strings.TrimSuffix(b.fix(), " (the next ADD does it by itself)"))
		}
	}
	if err != nil {
		return done, err
	}
	sum, capacity, releasable, err := n.addresses(env)
	if err != nil || capacity == 0 || sum.held < capacity || releasable == 0 {
		return done, nil
	}
	store, _, err := n.addressStore()
	if err != nil {
		return done, err
	}
	here, err := state{dir: n.DataDir}.containers()
	if err != nil {
		here = map[string]bool{}
	}
	gone, err := store.releaseEarlierBoot(here, nil)
	for _, r := range gone {
		done = append(done, "rm "+filepath.Join(store.dir, r.Addr.String()))
	}
	return done, err
}
