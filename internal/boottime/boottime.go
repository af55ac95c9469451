// Package boottime reads CLOCK_BOOTTIME and the boot ID, so that a lifetime
// shared between processes does not depend on the wall clock, which may be set. It
// keeps no state.
package boottime

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Moment is the reading of the clocks that are comparable between processes.
type Moment struct {
	Boot string        // boot ID, see random(4); differs for each boot
	Up   time.Duration // time since boot, including suspend (CLOCK_BOOTTIME)
	Wall time.Time
}

// Now reads the clocks. CLOCK_BOOTTIME is read last: if the process is stopped in
// between, remaining lifetimes are underestimated.
func Now() (Moment, error) {
	m := Moment{Wall: time.Now()}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return Moment{}, fmt.Errorf("reading the boot ID: %w", err)
	}
	m.Boot = strings.TrimSpace(string(boot))
	m.Up, err = Up()
	return m, err
}

// Up returns CLOCK_BOOTTIME.
func Up() (time.Duration, error) {
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return 0, fmt.Errorf("reading CLOCK_BOOTTIME: %w", err)
	}
	return time.Duration(up.Nano()), nil
}
