package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// gcPercent is the default GOGC. A low value trades CPU time for memory: the daemon
// runs on every node and allocates nothing per packet.
const gcPercent = 40

func limitHeap() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
}

// trimAfter is how long after the start the memory that only the start needed is freed.
const trimAfter = 5 * time.Second

// trim frees the memory that only the start needed, once the datapath has carried
// packets for trimAfter: free heap, and the program's pages. Starting touches nearly
// every page of the program, since each package initializes itself and the kernel maps
// 16 pages around each one that is touched. Running needs half of them.
func (d *node) trim(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-time.After(trimAfter):
	}
	debug.FreeOSMemory()
	if err := unmapProgram(); err != nil {
		d.log.Debug("the program's pages stay mapped", "error", err)
	}
}

// unmapProgram drops the program file's pages from this process's memory map. They stay
// in the page cache: the next access to one is a minor fault.
func unmapProgram() error {
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return err
	}
	defer f.Close()
	mappings, err := readOnly(bufio.NewScanner(f), program)
	for _, m := range mappings {
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED); errno != 0 {
			err = errors.Join(err, fmt.Errorf("madvise: %w", errno))
		}
	}
	return err
}

type mapping struct{ start, end uintptr }

// readOnly returns a file's mappings in smaps (proc_pid_smaps(5)) that are read-only and
// have no private pages: a page that a loader has relocated cannot be read from the file
// again.
func readOnly(smaps *bufio.Scanner, path string) (all []mapping, err error) {
	var m mapping
	eligible := false
	for smaps.Scan() {
		fields := strings.Fields(smaps.Text())
		switch {
		case len(fields) >= 6 && strings.Contains(fields[0], "-"):
			_, after, _ := strings.Cut(smaps.Text(), "/")
			eligible = "/"+after == path && (fields[1] == "r-xp" || fields[1] == "r--p")
			if _, err := fmt.Sscanf(fields[0], "%x-%x", &m.start, &m.end); err != nil {
				return nil, fmt.Errorf("reading smaps: %q", smaps.Text())
			}
		case len(fields) == 3 && fields[0] == "Anonymous:" && fields[1] == "0" && eligible:
			all = append(all, m)
		}
	}
	return all, smaps.Err()
}
