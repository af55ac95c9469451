package load

import (
	"runtime"
	"runtime/debug"
)

// Quiet keeps the runtime of this process out of the measurements: there are
// processors for every thread that sits in a system call, with so many streams
// at once, and no collection of garbage while traffic runs. The returned function
// undoes it.
func Quiet(streams int) (undo func()) {
	const rest = 16
	const most = 1024                                         // more cost the runtime more than they save
	before := runtime.GOMAXPROCS(min(2*streams, most) + rest) // a thread at each end
	collect := debug.SetGCPercent(-1)
	// Of what is made between the measurements little remains; what does may
	// grow to this many bytes before it is collected all the same.
	limit := debug.SetMemoryLimit(512 << 20)
	return func() {
		debug.SetMemoryLimit(limit)
		debug.SetGCPercent(collect)
		runtime.GOMAXPROCS(before)
	}
}
