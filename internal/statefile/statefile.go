// Package statefile reads and writes the small files that hold a node's state:
// subnet.env, the kept snapshot, the fence, the plugin's records. Write replaces a file
// atomically and durably; Read rejects files that could block or exhaust memory. The
// package does not know the contents: the package that owns a file parses it. Each path
// has one writer at a time, which its owner ensures.
package statefile

import (
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Temporary returns the name that Write prepares the file for path under. There is one
// per path, so the next Write overwrites what a crash left. It begins with a dot and ends
// in .tmp: programs that list the directory must skip such names.
func Temporary(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".tmp")
}

// Write replaces the file at path by data, with the given mode whatever the
// umask is. It writes a temporary file in the same directory, syncs it, renames
// it over path and syncs the directory: a reader sees the old or the new
// content whole, and so does the next boot after a crash. If it fails before
// the rename, the old file is unchanged.
func Write(path string, data []byte, mode os.FileMode) (err error) {
	tmp := Temporary(path)
	// Do not trust the mode and the owner of a leftover.
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
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir makes the entries of a directory durable: names created, renamed or
// removed in it.
func SyncDir(dir string) error {
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

// Read returns the content of the regular file at path, of at most limit bytes.
// It refuses anything else: a FIFO or a device could block or never end. If the
// file does not exist, the error is fs.ErrNotExist.
func Read(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1)) // the size may grow while it is read
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%s is longer than %d bytes", path, limit)
	}
	if err != nil {
		return nil, err
	}
	return data, nil
}
