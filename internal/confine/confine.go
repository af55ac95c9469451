// Package confine drops the privileges that a process does not need after its start:
// capabilities, the means to gain any (no_new_privs), and system calls that it never
// makes (seccomp). An attacker who runs code in the daemon can then do little beyond what
// the daemon itself does to the network. It keeps no state: the kernel holds the
// restrictions.
package confine

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Options say what the process keeps.
type Options struct {
	// FastPath keeps CAP_PERFMON, which the verifier requires for the fast path's
	// programs.
	FastPath bool
	// Kill kills the process at a denied system call, instead of failing the call. Tests
	// use it to prove that the daemon makes none.
	Kill bool
}

// Process confines every thread of this process, and the programs that it executes. A
// step that the kernel does not support, or a container forbids, is skipped and reported
// in the error; the other steps are done.
//
// A binary that is linked with cgo cannot do it (syscall.AllThreadsSyscall).
func Process(o Options) error {
	if _, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); errno != 0 {
		return fmt.Errorf("no_new_privs: %w", errno)
	}
	return errors.Join(dropCapabilities(keep(o)), filter(o.Kill))
}

// keep is the set of capabilities to keep, as bits. The systemd unit grants no others.
func keep(o Options) uint64 {
	set := uint64(1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW | 1<<unix.CAP_NET_BIND_SERVICE | 1<<unix.CAP_BPF)
	if o.FastPath {
		set |= 1 << unix.CAP_PERFMON
	}
	if lastCapability() < unix.CAP_BPF { // before Linux 5.8 one stood for both
		set |= 1 << unix.CAP_SYS_ADMIN
	}
	return set
}

// lastCapability is the highest capability of this kernel (capabilities(7)).
func lastCapability() int {
	b, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if n, perr := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && perr == nil {
		return n
	}
	return unix.CAP_LAST_CAP
}

// dropCapabilities drops all capabilities that are not in set.
func dropCapabilities(set uint64) error {
	var errs []error
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("reading the capabilities: %w", err)
	}
	// Drop from the bounding set first: that requires CAP_SETPCAP, which is dropped
	// below. A process without it gains nothing by execve either, since no_new_privs is
	// set.
	if data[unix.CAP_SETPCAP/32].Effective&(1<<(unix.CAP_SETPCAP%32)) != 0 {
		for c := range lastCapability() + 1 {
			if set&(1<<c) != 0 {
				continue
			}
			if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uintptr(c), 0); errno != 0 {
				errs = append(errs, fmt.Errorf("dropping capability %d from the bounding set: %w", c, errno))
				break
			}
		}
	}
	if _, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0, 0); errno != 0 {
		errs = append(errs, fmt.Errorf("clearing the ambient capabilities: %w", errno))
	}
	for i := range data {
		left := uint32(set >> (32 * i))
		data[i].Permitted &= left
		data[i].Effective &= left
		data[i].Inheritable = 0
	}
	// PID 0 is the calling thread.
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data[0])), 0); errno != 0 {
		errs = append(errs, fmt.Errorf("dropping capabilities: %w", errno))
	}
	return errors.Join(errs...)
}
