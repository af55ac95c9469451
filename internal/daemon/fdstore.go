package daemon

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// storedName is what our descriptors are called in systemd's store.
const storedName = "culvert"

// fdStore keeps the datapath's open descriptors where they outlive the daemon:
// with systemd, which hands them to the next one (sd_pid_notify_with_fds(3),
// FileDescriptorStoreMax= in the unit). It holds them itself as well, for a
// datapath that follows another in this process: without systemd it is for
// that alone.
type fdStore struct {
	mu   sync.Mutex
	left []int // not taken yet, ours
}

// newFDStore takes what the predecessor stored.
func newFDStore() *fdStore {
	s := &fdStore{}
	for _, f := range activation.Files(true) {
		if f.Name() == storedName {
			if fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0); err == nil {
				s.left = append(s.left, fd)
			}
		}
		_ = f.Close()
	}
	return s
}

// take returns what the predecessor left, which is then the caller's.
func (s *fdStore) take() []int {
	s.mu.Lock()
	defer s.mu.Unlock()
	left := s.left
	s.left = nil
	return left
}

// peek returns what is held, which stays the store's.
func (s *fdStore) peek() []int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.left)
}

// add holds what a predecessor passed on, until it is taken.
func (s *fdStore) add(fds []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.left = append(s.left, fds...)
}

// keep stores descriptors, which stay the caller's, in the place of those that
// are there; none empties the store.
func (s *fdStore) keep(fds []int) error {
	for _, fd := range s.take() {
		_ = unix.Close(fd)
	}
	s.mu.Lock()
	for _, fd := range fds {
		if own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err == nil {
			s.left = append(s.left, own)
		}
	}
	s.mu.Unlock()
	err := notify("FDSTOREREMOVE=1\nFDNAME="+storedName, nil)
	if len(fds) > 0 {
		err = errors.Join(err, notify("FDSTORE=1\nFDNAME="+storedName, unix.UnixRights(fds...)))
	}
	if err != nil {
		return fmt.Errorf("storing descriptors with systemd: %w", err)
	}
	return nil
}

// notify tells systemd, if it listens (sd_notify(3)).
func notify(state string, rights []byte) error {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return nil
	}
	socket, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(socket) }()
	return unix.Sendmsg(socket, []byte(state), rights, &unix.SockaddrUnix{Name: name}, 0)
}
