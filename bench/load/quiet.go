package load

import (
	"runtime"
	"runtime/debug"
)

// Quiet keeps the Go runtime of this process from disturbing measurements with the
// given number of streams: it raises GOMAXPROCS, so that threads in raw system calls
// do not block goroutines, and disables garbage collection. The returned function
// restores both.
func Quiet(streams int) (undo func()) {
	const rest = 16
	const most = 1024                                         // above this the runtime's own cost grows too large
	before := runtime.GOMAXPROCS(min(2*streams, most) + rest) // each stream has a thread at each end
	collect := debug.SetGCPercent(-1)
	// Reports and logs still allocate between measurements: collect garbage when
	// the memory reaches this limit.
	limit := debug.SetMemoryLimit(512 << 20)
	return func() {
		debug.SetMemoryLimit(limit)
		debug.SetGCPercent(collect)
		runtime.GOMAXPROCS(before)
	}
}
