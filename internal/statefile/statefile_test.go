package statefile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestWriteReplaces(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state.json")
	// A crash left a temporary file, readable by anyone.
	if err := os.WriteFile(Temporary(path), []byte("half of a la"), 0o666); err != nil {
		t.Fatal(err)
	}
	for _, content := range []string{"the first state\n", "2\n"} {
		if err := Write(path, []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
		got, err := Read(path, 64)
		if err != nil || string(got) != content {
			t.Errorf("read %q, %v", got, err)
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o640 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("left in the directory: %v, %v", entries, err)
	}
}

func TestFailedWriteKeepsTheOldState(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state.json")
	if err := Write(path, []byte("good"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Nothing larger than 4 bytes can be written by this process for a moment.
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 4, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	err := Write(path, []byte("longer than the limit"), 0o600)
	if e := unix.Setrlimit(unix.RLIMIT_FSIZE, &old); e != nil {
		t.Fatal(e)
	}
	if !errors.Is(err, unix.EFBIG) {
		t.Errorf("writing past the limit: %v", err)
	}
	if got, err := Read(path, 64); err != nil || string(got) != "good" {
		t.Errorf("read %q, %v", got, err)
	}
	if _, err := os.Stat(Temporary(path)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the temporary file is left: %v", err)
	}
}

func TestReadRefuses(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	long := filepath.Join(dir, "long")
	if err := os.WriteFile(long, []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		fifo:        "is not a regular file",
		dir:         "is not a regular file",
		long:        "is longer than 4 bytes",
		"/dev/zero": "is not a regular file",
	} {
		if got, err := Read(path, 4); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %q, %v; want an error that says %q", path, got, err, want)
		}
	}
	if _, err := Read(filepath.Join(dir, "none"), 4); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
	if got, err := Read(long, 5); err != nil || string(got) != "12345" {
		t.Errorf("a file of exactly the limit: %q, %v", got, err)
	}
}
