package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/utils"
	"golang.org/x/sys/unix"
)

// addressStore is host-local's directory of one network
// (plugins/ipam/host-local/backend/disk in containernetworking/plugins):
//
//	10.5.72.7             "<container>\r\n<interface>", or only the container in
//	                      versions before 0.7; empty if host-local was killed
//	                      while creating it
//	last_reserved_ip.<n>  where the next search starts
//	lock                  flock(2) around every change
type addressStore struct{ dir string }

// addressStore returns host-local's directory of the network; false if the IPAM
// plugin is another one.
func (n NetConf) addressStore() (addressStore, bool, error) {
	if kind, err := n.ipamType(); err != nil || kind != "host-local" {
		return addressStore{}, false, err
	}
	dir := "/var/lib/cni/networks"
	if raw, ok := n.IPAM["dataDir"]; ok {
		var set string
		if err := json.Unmarshal(raw, &set); err != nil {
			return addressStore{}, false, invalid("\"ipam\" has a \"dataDir\" that is not a string: %.80s", raw)
		}
		if set != "" {
			dir = set
		}
	}
	return addressStore{filepath.Join(dir, n.Name)}, true, nil
}

// reservation is one reserved address.
type reservation struct {
	Addr  netip.Addr
	Owner Attachment // no IfName in an old file; empty in an incomplete one
}

// parseReservation parses a file of the store. It returns false for any other file
// and for unknown content; the caller must not touch those.
func parseReservation(name string, text []byte) (reservation, bool) {
	a, err := netip.ParseAddr(name)
	if err != nil || a.Zone() != "" {
		return reservation{}, false
	}
	r := reservation{Addr: a}
	content := strings.TrimSpace(string(text))
	if content == "" {
		return r, len(text) == 0
	}
	r.Owner.ContainerID, r.Owner.IfName, _ = strings.Cut(content, "\r\n")
	if utils.ValidateContainerID(r.Owner.ContainerID) != nil ||
		r.Owner.IfName != "" && utils.ValidateInterfaceName(r.Owner.IfName) != nil {
		return reservation{}, false
	}
	return r, true
}

// release removes the reservations for which doomed returns true, holding the
// store's lock, and returns them. It keeps files modified after since: they may
// belong to an ADD in progress.
func (s addressStore) release(since time.Time, doomed func(reservation) bool) (released []reservation, err error) {
	fd, err := unix.Open(filepath.Join(s.dir, "lock"), unix.O_RDONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // no directory: host-local was never used
	}
	if err != nil {
		return nil, ioFailure("opening the lock of "+s.dir, err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := flock(fd, unix.LOCK_EX, lockTimeout); err != nil {
		return nil, ioFailure("locking "+s.dir, err)
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, ioFailure("reading "+s.dir, err)
	}
	var failed []error
	for _, e := range entries {
		path := filepath.Join(s.dir, e.Name())
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() || info.ModTime().After(since) {
			continue
		}
		text, err := os.ReadFile(path)
		if err != nil {
			failed = append(failed, err)
			continue
		}
		if r, ok := parseReservation(e.Name(), text); ok && doomed(r) {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				failed = append(failed, err)
				continue
			}
			released = append(released, r)
		}
	}
	if err := errors.Join(failed...); err != nil {
		return released, ioFailure("releasing addresses", fmt.Errorf("%s: %w", s.dir, err))
	}
	return released, nil
}
