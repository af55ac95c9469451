package statefile_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"culvert/internal/lab/labtest"
	"culvert/internal/statefile"
)

// TestWriteIsDurable checks the order of Write's system calls: it syncs the content
// before the rename, and the directory after it. If either sync fails, Write returns an
// error; if it is the content's, the old file is unchanged.
func TestWriteIsDurable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state", "file")
	if err := os.Mkdir(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	var err error
	calls := labtest.Syncs(t, func() { err = statefile.Write(path, []byte("old"), 0o600) }, nil)
	if want := []string{"sync .file.tmp", "rename", "sync state"}; err != nil || !slices.Equal(calls, want) {
		t.Errorf("%v, want %v (%v)", calls, want, err)
	}
	for _, c := range []struct{ fails, left string }{{".tmp", "old"}, {" state", "new"}} {
		calls = labtest.Syncs(t, func() { err = statefile.Write(path, []byte("new"), 0o600) }, func(call string) bool { return strings.HasSuffix(call, c.fails) })
		text, rerr := os.ReadFile(path)
		if err == nil || rerr != nil || string(text) != c.left {
			t.Errorf("where syncing%s fails: %v, %v (%v), %q", c.fails, calls, err, rerr, text)
		}
	}
}
