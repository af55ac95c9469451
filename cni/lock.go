package cni

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// lock is a lock on a state directory. An ADD has it shared, and hands the
// descriptor on to its delegates, so that it is held until the last of them
// ended even if the plugin was killed; who has it alone (unix.LOCK_EX) knows
// that no ADD is on its way.
type lock struct{ fd int }

// errLocked says that the lock could not be had in time.
var errLocked = errors.New("it is locked")

// take locks the directory, which it creates if need be. how is unix.LOCK_SH or
// unix.LOCK_EX.
func (s state) take(how int, atMost time.Duration) (lock, error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return lock{}, ioFailure("creating the state directory", err)
	}
	// Without O_CLOEXEC, which is what hands it on.
	fd, err := unix.Open(s.dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return lock{}, ioFailure("opening the state directory", err)
	}
	if err := flock(fd, how, atMost); err != nil {
		_ = unix.Close(fd)
		return lock{}, fmt.Errorf("locking %s: %w", s.dir, err)
	}
	return lock{fd}, nil
}

func (l lock) release() { _ = unix.Close(l.fd) }

// flock locks the file behind a descriptor, waiting for a while.
func flock(fd, how int, atMost time.Duration) error {
	for end := time.Now().Add(atMost); ; time.Sleep(2 * time.Millisecond) {
		err := unix.Flock(fd, how|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
		case !errors.Is(err, unix.EWOULDBLOCK):
			return err
		case time.Now().After(end):
			return errLocked
		}
	}
}
