package api_test

import (
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"culvert/internal/api"
)

// TestSocketModeFromCreation opens the socket repeatedly while another goroutine polls
// its mode: it never permits access by other users.
func TestSocketModeFromCreation(t *testing.T) {
	for _, c := range []struct {
		group string
		mode  os.FileMode
	}{{"", 0o600}, {"1", 0o660}} {
		if c.group != "" && os.Getuid() != 0 {
			continue
		}
		dir := t.TempDir()
		stop := make(chan struct{})
		var looking sync.WaitGroup
		looks := 0
		looking.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				st, err := os.Lstat(filepath.Join(dir, "culvert.sock"))
				if err != nil {
					continue
				}
				looks++
				group := st.Sys().(*syscall.Stat_t).Gid
				if m := st.Mode().Perm(); m != 0o600 && (m != c.mode || c.group == "1" && group != 1) {
					t.Errorf("mode %o, group %d", m, group)
					return
				}
			}
		})
		for range 300 {
			l, err := api.Open(dir, c.group)
			if err != nil {
				t.Fatal(err)
			}
			st, err := os.Lstat(filepath.Join(dir, "culvert.sock"))
			if err != nil || st.Mode().Perm() != c.mode {
				t.Errorf("mode %v (%v)", st.Mode(), err)
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
		}
		close(stop)
		looking.Wait()
		t.Logf("%d looks", looks)
	}
	if _, err := api.Open(t.TempDir(), "no such group"); err == nil {
		t.Error("a group that is not there")
	}
}
