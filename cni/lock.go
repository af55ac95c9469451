package cni

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// lock is a flock(2) on the state directory. An ADD holds it shared. Its delegates
// inherit the descriptor, so that the lock is held until the last of them exits,
// even if the plugin is killed. A holder of the exclusive lock (unix.LOCK_EX) knows
// that no ADD is in progress.
type lock struct{ fd int }

// errLocked means that the lock could not be acquired in time.
var errLocked = errors.New("it is locked")

// take locks the directory, and creates it if necessary. how is unix.LOCK_SH or
// unix.LOCK_EX.
func (s state) take(how int, atMost time.Duration) (lock, error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return lock{}, ioFailure("creating the state directory", err)
	}
	// No O_CLOEXEC: the delegates inherit the descriptor.
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

// flock locks the file of a descriptor, waiting at most atMost.
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
