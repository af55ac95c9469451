package daemon

import (
	"github.com/cilium/ebpf/rlimit"

	"culvert/backend/fastpath"
	"culvert/internal/confine"
	"culvert/internal/priority"
)

// Confine is whether the daemon drops capabilities and system calls after its start.
type Confine string

const (
	ConfineOn  Confine = "on"
	ConfineOff Confine = "off"
	// ConfineKill is ConfineOn, but a forbidden system call kills the daemon instead of
	// failing. The tests use it to prove that the daemon makes none.
	ConfineKill Confine = "kill"
)

// raisePriority raises the priority of a daemon that may carry packets itself, if asked to. It must run
// before confine, which takes the right to. open lowers it again if the kernel carries them.
func (o Options) raisePriority() {
	if o.Datapath == Kernel || !o.Tunnel.Priority {
		return
	}
	if err := priority.Raise(); err != nil { // the status says so, too
		o.Log.Debug("cannot raise the priority", "error", err)
	}
}

// confine drops what the daemon does not need. It must run before the threads that
// carry packets start. A failure, such as in a container that forbids it, is logged
// only.
func (o Options) confine() {
	// Before Linux 5.11 eBPF maps are locked memory, whose limit only CAP_SYS_RESOURCE
	// raises. Where this fails, loading the programs reports it.
	_ = rlimit.RemoveMemlock()
	if o.Confine == ConfineOff {
		return
	}
	if err := confine.Process(confine.Options{FastPath: o.FastPath == fastpath.On || o.FastPath != fastpath.Off && o.Datapath != Userspace, Kill: o.Confine == ConfineKill}); err != nil {
		o.Log.Warn("cannot drop all rights that are not needed", "error", err)
	}
}
