package host

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/names"
)

// TCX reports whether the kernel attaches programs to a link by itself (tcx, Linux 6.6).
// A tc filter needs a clsact qdisc, and while a link gets or loses one the kernel drops
// what the link sends (dev_deactivate in qdisc_graft, net/sched/sch_api.c).
var TCX = sync.OnceValue(func() bool {
	_, err := Programs(1, netlink.HANDLE_MIN_INGRESS) // any link: lo
	return err == nil
})

// tcxOf returns the attach type for a direction (Filter.Parent).
func tcxOf(parent uint32) ebpf.AttachType {
	if parent == netlink.HANDLE_MIN_EGRESS {
		return ebpf.AttachTCXEgress
	}
	return ebpf.AttachTCXIngress
}

// Programs returns the programs that are attached to a link with tcx, in the order in
// which they run.
func Programs(index int, parent uint32) ([]ebpf.ProgramID, error) {
	ids, _, err := queryTCX(index, parent)
	return ids, err
}

func queryTCX(index int, parent uint32) (ids []ebpf.ProgramID, revision uint64, err error) {
	r, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: tcxOf(parent)})
	if err != nil {
		return nil, 0, err
	}
	for _, p := range r.Programs {
		ids = append(ids, p.ID)
	}
	return ids, r.Revision, nil
}

// Attach attaches a program to a link with tcx, before the programs that are attached
// already unless it is one of them, and detaches the replaced ones.
func Attach(index int, parent uint32, program *ebpf.Program, replaces []ebpf.ProgramID) error {
	if err := link.RawAttachProgram(link.RawAttachProgramOptions{
		Target: index, Program: program, Attach: tcxOf(parent), Anchor: link.Head(),
	}); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	var errs []error
	for _, id := range replaces {
		errs = append(errs, detach(index, parent, id))
	}
	return errors.Join(errs...)
}

// detach detaches a program from a link. BPF_F_REPLACE and most other calls need a
// descriptor of the program, and to open one for an earlier process's program takes
// CAP_SYS_ADMIN. So the program is identified by its position: the first one, or the one
// after another.
func detach(index int, parent uint32, id ebpf.ProgramID) error {
	const (
		before, after, byID = 1 << 3, 1 << 4, 1 << 5 // BPF_F_BEFORE, BPF_F_AFTER, BPF_F_ID (linux/bpf.h)
		tries               = 20
	)
	var err error
	for range tries {
		ids, revision, asked := queryTCX(index, parent)
		i := slices.Index(ids, id)
		if asked != nil || i < 0 {
			return asked
		}
		// The part of union bpf_attr for BPF_PROG_DETACH.
		attr := struct {
			target, program, kind, flags, replace, relative uint32
			revision                                        uint64
		}{target: uint32(index), kind: uint32(tcxOf(parent)), flags: before, revision: revision}
		if i > 0 {
			attr.flags, attr.relative = after|byID, uint32(ids[i-1])
		}
		_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_DETACH, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
		runtime.KeepAlive(&attr)
		if errno == 0 || errno == unix.ENOENT || errno == unix.ENODEV {
			return nil
		}
		err = os.NewSyscallError("bpf", errno)
		if errno != unix.ESTALE { // another program has changed the list meanwhile
			break
		}
	}
	return fmt.Errorf("detaching the program %d: %w", id, err)
}

// Registry is the set of culvert's programs that are attached with tcx. Each is also a tc
// filter where no packets pass: at the egress of names.JoinFar, with the program's id as
// handle. A filter shows its program's name and id, while to read the name of a program
// attached with tcx takes CAP_SYS_ADMIN, which the daemon does not have. So a later daemon
// recognizes them as culvert's.
type Registry struct {
	Programs []ebpf.ProgramID
	index    int // of names.JoinFar; 0: it does not exist
}

const registryHook = netlink.HANDLE_MIN_EGRESS

// ReadRegistry reads the registry from the kernel.
func ReadRegistry() (r Registry, err error) {
	l, err := netlink.LinkByName(names.JoinFar)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return r, nil
	}
	if err != nil {
		return r, err
	}
	r.index = l.Attrs().Index
	filters, err := Retry(func() ([]netlink.Filter, error) { return netlink.FilterList(l, registryHook) })
	if err != nil {
		return r, nil // there is no qdisc
	}
	for _, f := range filters {
		if b, ok := f.(*netlink.BpfFilter); ok && OurFilter(f) {
			r.Programs = append(r.Programs, ebpf.ProgramID(b.Id))
		}
	}
	return r, nil
}

// Exists reports whether programs can be registered: the link for that exists.
func (r Registry) Exists() bool { return r.index != 0 }

// Add registers a program, unless it is registered.
func (r *Registry) Add(name string, program *ebpf.Program, id ebpf.ProgramID) error {
	if slices.Contains(r.Programs, id) {
		return nil
	}
	if err := netlink.FilterReplace(&netlink.BpfFilter{FilterAttrs: r.filter(id), Fd: program.FD(), Name: name, DirectAction: true}); err != nil {
		return fmt.Errorf("registering %s on %s: %w", name, names.JoinFar, err)
	}
	r.Programs = append(r.Programs, id)
	return nil
}

// Remove removes the registered programs for which gone is true from the kernel's registry,
// not from Programs.
func (r Registry) Remove(gone func(ebpf.ProgramID) bool) error {
	var errs []error
	for _, id := range r.Programs {
		if gone(id) {
			errs = append(errs, netlink.FilterDel(&netlink.BpfFilter{FilterAttrs: r.filter(id)}))
		}
	}
	return errors.Join(errs...)
}

func (r Registry) filter(id ebpf.ProgramID) netlink.FilterAttrs {
	return netlink.FilterAttrs{LinkIndex: r.index, Parent: registryHook, Priority: names.FilterPriority, Protocol: unix.ETH_P_ALL, Handle: uint32(id)}
}

// Ours returns those of the programs that are culvert's: registered ones, and if this
// process may ask for names, those that are called so.
func Ours(programs, registered []ebpf.ProgramID) []ebpf.ProgramID {
	var ours []ebpf.ProgramID
	for _, id := range programs {
		if slices.Contains(registered, id) || named(id) {
			ours = append(ours, id)
		}
	}
	return ours
}

// named reports whether the program has a name of culvert's. The kernel keeps 15 bytes of it.
func named(id ebpf.ProgramID) bool {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return false
	}
	defer p.Close()
	info, err := p.Info()
	return err == nil && strings.HasPrefix(info.Name, names.FilterPrefix)
}
