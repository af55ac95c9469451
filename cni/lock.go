package cni

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
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

// attachmentLocks is the file in the state directory that the locks of attachments
// are taken on.
const attachmentLocks = ".lock"

// takeAttachment locks one attachment, against an ADD of it, or a release of what an
// earlier container of that name left (releaseIf). Without it, a release that read the
// old record could undo the ADD that replaces it. The delegates inherit the descriptor.
//
// The lock is a byte of a file, at an offset from a hash, so that no file per attachment
// is left (open file description locks, fcntl(2)). Two attachments that share a byte
// only wait for each other.
func (s state) takeAttachment(a Attachment, atMost time.Duration) (lock, error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return lock{}, ioFailure("creating the state directory", err)
	}
	fd, err := unix.Open(filepath.Join(s.dir, attachmentLocks), unix.O_RDWR|unix.O_CREAT, 0o600)
	if err != nil {
		return lock{}, ioFailure("opening the attachments' lock", err)
	}
	sum := fnv.New64a()
	_, _ = fmt.Fprint(sum, a.ContainerID, ":", a.IfName)
	span := unix.Flock_t{Type: unix.F_WRLCK, Start: int64(sum.Sum64() >> 2), Len: 1}
	err = poll(atMost, func() error {
		err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &span)
		if errors.Is(err, unix.EACCES) {
			err = unix.EAGAIN // POSIX allows either
		}
		return err
	})
	if err != nil {
		_ = unix.Close(fd)
		return lock{}, fmt.Errorf("locking the attachment %s, %s: %w", a.ContainerID, a.IfName, err)
	}
	return lock{fd}, nil
}

// releaseIf deletes an attachment whose container no longer exists, and its record, if
// gone still returns true once the attachment is locked. It does nothing to an attachment
// whose ADD is in progress.
func (s state) releaseIf(ctx context.Context, a Attachment, gone func(record) bool) (released bool, err error) {
	l, err := s.takeAttachment(a, 0)
	if errors.Is(err, errLocked) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer l.release()
	r, err := s.load(a) // an ADD may have replaced it since it was listed
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil || !gone(r) {
		return false, err
	}
	if err := delegate(ctx, "DEL", a, r.Delegate, r.netns()); err != nil {
		return false, err
	}
	return true, s.forget(a)
}

// flock locks the file of a descriptor, waiting at most atMost.
func flock(fd, how int, atMost time.Duration) error {
	return poll(atMost, func() error { return unix.Flock(fd, how|unix.LOCK_NB) })
}

// poll retries a lock that another holds (EWOULDBLOCK), for at most atMost.
func poll(atMost time.Duration, try func() error) error {
	for end := time.Now().Add(atMost); ; time.Sleep(2 * time.Millisecond) {
		err := try()
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
