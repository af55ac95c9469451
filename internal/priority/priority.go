// Package priority raises the scheduling priority of this process, whose threads carry
// packets in userspace: otherwise a packet waits for a CPU behind the programs that send
// and receive, where the kernel's own tunnel does not wait.
package priority

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Nice is the nice value that Raise sets. A thread at -10 gets at most nine tenths of a
// CPU beside one at 0: it starves nobody.
const Nice = -10

// Raise sets the nice value of every thread at 0. Those that start later inherit it, and so
// do child processes. Single threads are not enough: Go moves the goroutines that carry
// packets between threads, and one that is locked to its thread waits for another thread
// whenever the runtime preempts it.
//
// A process that was started with another nice value keeps it. Raise needs CAP_SYS_NICE or
// RLIMIT_NICE.
func Raise() error { return change(0, Nice) }

// Lower undoes Raise.
func Lower() error { return change(Nice, 0) }

// autogroup gives the process's session the nice value, if it leads one: where neither has
// a control group of its own, the kernel shares CPUs between sessions first, as if each were
// one thread of that nice value (sched(7)).
func autogroup(nice int) error {
	if id, err := unix.Getsid(0); err != nil || id != os.Getpid() {
		return err
	}
	for {
		err := os.WriteFile("/proc/self/autogroup", []byte(strconv.Itoa(nice)), 0)
		switch {
		case errors.Is(err, unix.EAGAIN): // it takes one in 100 ms of the whole host
			time.Sleep(20 * time.Millisecond)
			continue
		case errors.Is(err, os.ErrNotExist): // a kernel without
			return nil
		}
		return err
	}
}

// change gives every thread with the one nice value the other, and the session that.
func change(from, to int) error {
	if n, err := Current(); err != nil || n != from {
		return err
	}
	if err := threads(from, to); err != nil {
		return err
	}
	return autogroup(to)
}

func threads(from, to int) error {
	for changed := true; changed; { // until there is none that another started meanwhile
		changed = false
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return fmt.Errorf("listing this process's threads: %w", err)
		}
		for _, task := range tasks {
			thread, err := strconv.Atoi(task.Name())
			if err != nil {
				return fmt.Errorf("listing this process's threads: %w", err)
			}
			n, err := nice(thread)
			if err == nil && n == from {
				err = unix.Setpriority(unix.PRIO_PROCESS, thread, to)
				changed = true
			}
			if err != nil && !errors.Is(err, unix.ESRCH) { // it has ended
				return fmt.Errorf("setting the nice value %d: %w", to, err)
			}
		}
	}
	return nil
}

// Current returns the nice value of the process, that is, of its first thread.
func Current() (int, error) { return nice(os.Getpid()) }

func nice(thread int) (int, error) {
	n, err := unix.Getpriority(unix.PRIO_PROCESS, thread)
	return 20 - n, err // the system call returns 20 less the nice value
}
