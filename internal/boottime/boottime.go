// Package boottime reads the clock that nobody sets: a lifetime that another
// process counts must not end, nor last, because somebody set the wall clock.
package boottime

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Moment is a moment as the clocks have it that outlive a process.
type Moment struct {
	Boot string        // random(4): another for each boot
	Up   time.Duration // since then, suspended or not (CLOCK_BOOTTIME)
	Wall time.Time
}

// Now reads the clocks; the one that a lifetime counts from last, so that a
// process that is stopped in between takes it for shorter.
func Now() (Moment, error) {
	m := Moment{Wall: time.Now()}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return Moment{}, fmt.Errorf("asking which boot this is: %w", err)
	}
	m.Boot = strings.TrimSpace(string(boot))
	m.Up, err = Up()
	return m, err
}

// Up is CLOCK_BOOTTIME alone.
func Up() (time.Duration, error) {
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return 0, fmt.Errorf("reading CLOCK_BOOTTIME: %w", err)
	}
	return time.Duration(up.Nano()), nil
}
