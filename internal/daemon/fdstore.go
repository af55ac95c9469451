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

// storedName is the name of our descriptors in systemd's store.
const storedName = "culvert"

// fdStore stores duplicates of the datapath's descriptors. systemd keeps them beyond
// the daemon's end and passes them to the next one (sd_pid_notify_with_fds(3),
// FileDescriptorStoreMax= in the unit). The process also keeps them itself, for the
// next datapath in this process and for a handover.
type fdStore struct {
	mu   sync.Mutex
	left []int // owned, not taken yet
}

// newFDStore returns a store with the descriptors that systemd passed.
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

// take empties the store without closing; the caller owns the descriptors.
func (s *fdStore) take() []int {
	s.mu.Lock()
	defer s.mu.Unlock()
	left := s.left
	s.left = nil
	return left
}

// peek returns the descriptors, which the store still owns.
func (s *fdStore) peek() []int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.left)
}

// add adds descriptors that a predecessor passed; the store owns them.
func (s *fdStore) add(fds []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.left = append(s.left, fds...)
}

// keep replaces the stored descriptors, here and in systemd, with duplicates of fds,
// which the caller still owns. Empty fds empties the store.
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

// notify sends a state to systemd (sd_notify(3)); without NOTIFY_SOCKET it does
// nothing.
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
