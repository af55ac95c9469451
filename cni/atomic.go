package cni

import (
	"fmt"
	"os"
	"path/filepath"
)

// temporary is where writeFileAtomic prepares the file: one name per file, so
// that what a crash leaves behind is overwritten by the next attempt. Names
// that begin with a dot are never state of a container.
func temporary(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".tmp")
}

// writeFileAtomic replaces the file at path by data: written beside it,
// synced, renamed over it, and the directory synced, so that neither a reader
// nor a crash meets half of it. There is one writer per path.
func writeFileAtomic(path string, data []byte, mode os.FileMode) (err error) {
	tmp := temporary(path)
	// A leftover's mode and owner are not ours to trust.
	if err := os.Remove(tmp); err != nil && !os.IsNotExist(err) {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(tmp)
		}
	}()
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(mode) // whatever the umask is
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes the entries of a directory durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("syncing %s: %w", dir, err)
	}
	return nil
}
