package load

import (
	"runtime"
	"runtime/debug"
)

// Quiet keeps the runtime of this process out of the measurements: there are
// processors for every thread that sits in a system call, and no collection of
// garbage while traffic runs. The returned function undoes it.
func Quiet() (undo func()) {
	const processors = 48 // two threads per stream of the largest workload, and the rest
	before := runtime.GOMAXPROCS(processors)
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
