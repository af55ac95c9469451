package lab

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"culvert/internal/statefile"
)

// Root holds a directory for each lab of this machine. It exists only while there
// are labs.
const Root = "/run/culvert-lab"

// idPrefix begins the ID of every lab, and so the names of its namespaces.
const idPrefix = "cvt-"

// ownerFile names the process that owns a lab. It is written under the same lock as
// the lab's directory is created, so a directory without it has no owner.
const ownerFile = "owner.json"

type owner struct {
	Process processID `json:"process"`
	Keep    bool      `json:"keep"` // the lab outlives its owner
}

// ErrInUse means that the process that created the lab is still running.
var ErrInUse = errors.New("the lab is in use")

// ErrNoLab means that no lab has the given ID.
var ErrNoLab = errors.New("no such lab")

// locked creates Root and calls fn while holding the lock on it, so that no other
// process creates or removes a lab meanwhile. Afterwards, if no lab is left, it
// removes Root and undoes prepareNetnsDir. The lock is on the directory itself, since
// a lock file could not be removed without a race.
func locked(fn func() error) error {
	dir, err := lockRoot()
	if err != nil {
		return fmt.Errorf("locking %s: %w", Root, err)
	}
	defer dir.Close() // unlocks
	err = fn()
	if entries, rerr := os.ReadDir(Root); rerr == nil && !slices.ContainsFunc(entries, fs.DirEntry.IsDir) {
		releaseNetnsDir()
		_ = os.Remove(Root)
	}
	return err
}

func lockRoot() (*os.File, error) {
	for {
		if err := os.MkdirAll(Root, 0o755); err != nil {
			return nil, err
		}
		dir, err := os.Open(Root)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed by the process that removed the last lab
		}
		if err != nil {
			return nil, err
		}
		if err := flock(dir); err != nil {
			_ = dir.Close()
			return nil, err
		}
		held, herr := dir.Stat()
		now, nerr := os.Stat(Root)
		if herr == nil && nerr == nil && os.SameFile(held, now) {
			return dir, nil
		}
		_ = dir.Close() // it was removed before we got the lock
	}
}

func flock(f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Keep marks the lab to outlive this process: Sweep does not remove it, only Remove
// does. A lab with Options.Keep that was not marked is swept like any other, since
// its owner was killed before the lab was complete.
func (l *Lab) Keep() error {
	if !l.options.Keep {
		return fmt.Errorf("keeping lab %s: it was created without Options.Keep", l.ID)
	}
	return locked(func() error { return writeOwner(l.ID, true) })
}

// writeOwner records this process as the lab's owner.
func writeOwner(id string, keep bool) error {
	self, err := identify(os.Getpid())
	if err != nil {
		return err
	}
	text, err := json.Marshal(owner{Process: self, Keep: keep})
	if err != nil {
		return err
	}
	path := filepath.Join(Root, id, ownerFile)
	return statefile.Write(path, text, 0o644)
}

// register creates a lab's directory, owned by this process.
func register() (id string, err error) {
	err = locked(func() error {
		if err := prepareNetnsDir(); err != nil {
			return fmt.Errorf("preparing %s: %w", netnsDir, err)
		}
		for {
			var random [2]byte
			_, _ = rand.Read(random[:]) // never fails
			id = idPrefix + hex.EncodeToString(random[:])
			err := os.Mkdir(filepath.Join(Root, id), 0o755)
			if errors.Is(err, fs.ErrExist) {
				continue
			}
			if err != nil {
				return err
			}
			return writeOwner(id, false)
		}
	})
	return id, err
}

// These files in Root record what prepareNetnsDir did.
const (
	markMadeDir   = "netns-dir-made"
	markMadeMount = "netns-mount-made"
)

// prepareNetnsDir makes /run/netns a shared mount point, as `ip netns add` does
// (iproute2, ip/ipnetns.c). If `ip netns add` did that later, it would mount copies
// over our namespaces' names and so keep them alive.
func prepareNetnsDir() error {
	mark := func(name string) error { return os.WriteFile(filepath.Join(Root, name), nil, 0o644) }
	err := os.Mkdir(netnsDir, 0o755)
	if err == nil {
		err = mark(markMadeDir)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	err = unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
	if !errors.Is(err, unix.EINVAL) {
		return err
	}
	if err := unix.Mount(netnsDir, netnsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	if err := mark(markMadeMount); err != nil {
		return err
	}
	return unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
}

// releaseNetnsDir undoes what prepareNetnsDir did, unless the directory contains
// other programs' namespaces.
func releaseNetnsDir() {
	undo := func(name string, fn func() error) {
		path := filepath.Join(Root, name)
		if _, err := os.Stat(path); err == nil {
			_ = fn() // fails if another program uses it, and then it stays
			_ = os.Remove(path)
		}
	}
	entries, err := os.ReadDir(netnsDir)
	free := err == nil && len(entries) == 0
	undo(markMadeMount, func() error {
		if !free {
			return nil
		}
		return unix.Unmount(netnsDir, 0)
	})
	undo(markMadeDir, func() error {
		if !free {
			return nil
		}
		return os.Remove(netnsDir)
	})
}

// Sweep removes the labs whose owner has exited, except those marked by Keep, and
// returns their IDs.
func Sweep() ([]string, error) {
	if _, err := os.Stat(Root); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var swept []string
	err := locked(func() error {
		var errs []error
		ids, err := list()
		if err != nil {
			return err
		}
		for _, id := range ids {
			o, err := readOwner(id)
			if err == nil && (o.Keep || o.Process.alive()) {
				continue
			}
			if err := removeLocked(id); err != nil {
				errs = append(errs, fmt.Errorf("lab %s: %w", id, err))
				continue
			}
			swept = append(swept, id)
		}
		return errors.Join(errs...)
	})
	if err != nil {
		return swept, fmt.Errorf("removing labs whose owner has exited: %w", err)
	}
	return swept, nil
}

// Remove removes a lab that another process created and kept, or whose owner has
// exited. The error is ErrNoLab if there is none, and ErrInUse if its owner is still
// running.
func Remove(id string) error {
	if _, err := os.Stat(Root); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %s", ErrNoLab, id)
	}
	return locked(func() error {
		ids, err := list()
		if err != nil {
			return err
		}
		if !slices.Contains(ids, id) {
			return fmt.Errorf("%w: %s", ErrNoLab, id)
		}
		if o, err := readOwner(id); err == nil && o.Process.alive() && o.Process.PID != os.Getpid() {
			return fmt.Errorf("%w: process %d removes it when it exits: %s", ErrInUse, o.Process.PID, id)
		}
		return removeLocked(id)
	})
}

// List returns the IDs of the labs on this machine.
func List() ([]string, error) { return list() }

func list() ([]string, error) {
	entries, err := os.ReadDir(Root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, e := range entries {
		if e.IsDir() && strings.HasPrefix(e.Name(), idPrefix) {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

func readOwner(id string) (owner, error) {
	var o owner
	text, err := os.ReadFile(filepath.Join(Root, id, ownerFile))
	if err != nil {
		return o, err
	}
	return o, json.Unmarshal(text, &o)
}

// remove removes a lab that this process owns.
func remove(id string) error {
	// Stop the processes before taking the lock, since that may take seconds.
	err := stopProcesses(id)
	return errors.Join(err, locked(func() error { return removeLocked(id) }))
}

// removeLocked stops the lab's processes and removes its namespaces, continuing after
// errors. It removes the directory last, and only if there was no error.
func removeLocked(id string) error {
	errs := []error{stopProcesses(id)}
	names, err := namespacesOf(id)
	errs = append(errs, err)
	for _, name := range names {
		errs = append(errs, deleteNamespace(name))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return os.RemoveAll(filepath.Join(Root, id))
}

func namespacesOf(id string) ([]string, error) {
	entries, err := os.ReadDir(netnsDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), id+"-") {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// stopProcesses stops the recorded processes of the nodes, then those of the fabric,
// on which the nodes depend, then all others in the lab's namespaces, such as child
// processes or a user's shell.
func stopProcesses(id string) error {
	records, err := processRecords(filepath.Join(Root, id))
	errs := []error{err}
	var nodes, fabric, rest []processID
	for _, r := range records {
		if r.Namespace == id+"-fabric" {
			fabric = append(fabric, r.Process)
		} else {
			nodes = append(nodes, r.Process)
		}
	}
	errs = append(errs, stopAll(nodes), stopAll(fabric))
	names, err := namespacesOf(id)
	errs = append(errs, err)
	rest = processesIn(names)
	return errors.Join(append(errs, stopAll(rest))...)
}

// stopAll stops processes concurrently.
func stopAll(ids []processID) error {
	errs := make([]error, len(ids))
	var wg sync.WaitGroup
	for i, id := range ids {
		wg.Go(func() {
			if err := id.stop(stopGrace); err != nil {
				errs[i] = fmt.Errorf("stopping process %d: %w", id.PID, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
