package daemon

import (
	"os"
	"runtime/debug"
)

// gcPercent is how much the heap may grow between two collections, in percent of
// what is in use, unless GOGC is set. The daemon is on every node and allocates
// nothing per packet, so it spends processor time on memory.
const gcPercent = 40

func limitHeap() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
}
