package daemon

import (
	"os"
	"runtime/debug"
)

// gcPercent is the default GOGC. A low value trades CPU time for memory: the daemon
// runs on every node and allocates nothing per packet.
const gcPercent = 40

func limitHeap() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
}
