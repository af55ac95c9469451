// Package confine takes from a process what it does not need once it has started:
// capabilities, the way to gain any, and system calls that it never makes. What an
// attacker who runs code in the daemon can do is then what the daemon itself does
// to the network, and little else.
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

// Options say what is left.
type Options struct {
	// FastPath keeps CAP_PERFMON, which the kernel's verifier asks for with the fast
	// path's programs.
	FastPath bool
	// Kill ends the process at a system call that is denied, rather than letting the
	// call fail: for tests, which prove by it that none is made.
	Kill bool
}

// Process confines every thread of this process, and what it executes. Each step
// that the kernel does not offer, or a container forbids, is left out and told in
// the error; the others are taken all the same.
//
// A binary that is linked with cgo cannot do it (syscall.AllThreadsSyscall).
func Process(o Options) error {
	if _, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); errno != 0 {
		return fmt.Errorf("no_new_privs: %w", errno)
	}
	return errors.Join(dropCapabilities(keep(o)), filter(o.Kill))
}

// keep is the set of capabilities that stay, as bits. The systemd unit gives no others.
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

// lastCapability is the highest that this kernel knows (capabilities(7)).
func lastCapability() int {
	b, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if n, perr := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && perr == nil {
		return n
	}
	return unix.CAP_LAST_CAP
}

// dropCapabilities leaves those of set that the process has.
func dropCapabilities(set uint64) error {
	var errs []error
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("reading the capabilities: %w", err)
	}
	// From the bounding set first: it takes CAP_SETPCAP, which goes then. A process
	// without it gains nothing by execve either, as no_new_privs is set.
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
	// Of the calling thread whichever it is: PID 0.
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data[0])), 0); errno != 0 {
		errs = append(errs, fmt.Errorf("dropping capabilities: %w", errno))
	}
	return errors.Join(errs...)
}
