package daemon

import (
	"culvert/backend/fastpath"
	"culvert/internal/confine"
)

// Confine is whether the daemon gives up, once it has started, what it does not need.
type Confine string

const (
	ConfineOn  Confine = "on"
	ConfineOff Confine = "off"
	// ConfineKill is on, and ends the daemon where it makes a system call that it has
	// given up: the tests run so, which proves that it makes none.
	ConfineKill Confine = "kill"
)

// confine is done before there is any thread that carries packets. What cannot be given
// up, as in a container that forbids it, is told and no reason not to start.
func (o Options) confine() {
	if o.Confine == ConfineOff {
		return
	}
	if err := confine.Process(confine.Options{FastPath: o.FastPath != fastpath.Off && o.Datapath != Userspace, Kill: o.Confine == ConfineKill}); err != nil {
		o.Log.Warn("not all rights that are not needed could be given up", "error", err)
	}
}
