package kept

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"culvert/subnet"
)

// state returns a state whose lease never expires.
func state(t testing.TB) State {
	t.Helper()
	_, s, err := parse(example(t))
	if err != nil {
		t.Fatal(err)
	}
	s.Lease.ID = 0
	return *s
}

// lines is a log that a test can read.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

// take returns what was written since the last call.
func (l *lines) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.buf.Reset()
	return l.buf.String()
}

// A failed write is retried every second. It is logged, and so are its end and the
// next failure.
func TestSave(t *testing.T) {
	s := state(t)
	dir := filepath.Join(t.TempDir(), "run")
	log := &lines{}
	c := NewCopy(filepath.Join(dir, "snapshot.json"), slog.New(slog.NewTextHandler(log, nil)))
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		changed, last := subnet.NewSignal(), int64(0)
		var saving sync.WaitGroup
		saving.Go(func() {
			c.Save(ctx, changed, func() (*State, func()) {
				if s.Revision == last {
					return nil, nil
				}
				next := s
				return &next, func() { last = next.Revision }
			})
		})
		change := func() {
			s.Revision++
			changed.Raise()
			time.Sleep(10 * time.Second)
			synctest.Wait()
		}
		for range 2 {
			change()
			if text := log.take(); strings.Count(text, "cannot write the snapshot file") != 1 || strings.Count(text, "\n") != 1 {
				t.Errorf("without the directory: %s", text)
			}
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * time.Second)
			synctest.Wait()
			if k, err := c.Read("node-1"); err != nil || k == nil || k.Revision != s.Revision {
				t.Errorf("with the directory: %+v, %v", k, err)
			}
			if text := log.take(); strings.Count(text, "the snapshot file is written again") != 1 {
				t.Errorf("with the directory: %s", text)
			}
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}

		// What changes last is written when the context ends.
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		changed.Raise()
		synctest.Wait()
		s.Revision++
		cancel()
		saving.Wait()
		if k, err := c.Read("node-1"); err != nil || k == nil || k.Revision != s.Revision {
			t.Errorf("at the end: %+v, %v", k, err)
		}
	})

	if _, err := c.Read("node-2"); err == nil || !strings.Contains(err.Error(), `belongs to the node "node-1"`) {
		t.Errorf("read by another node: %v", err)
	}
	for _, step := range []struct {
		do    func()
		there bool
	}{{c.Forget, false}, {c.Forget, false}, {c.Allow, true}} {
		step.do()
		if err := c.Write(s); err != nil {
			t.Fatal(err)
		}
		if k, err := c.Read("node-1"); err != nil || (k != nil) != step.there {
			t.Errorf("got %+v, %v; want a state: %v", k, err, step.there)
		}
	}
	unnamed := NewCopy("", slog.New(slog.DiscardHandler))
	unnamed.Save(t.Context(), nil, nil)
	unnamed.Forget()
	if k, err := unnamed.Read("node-1"); k != nil || err != nil || unnamed.Write(s) != nil {
		t.Errorf("without a file: %+v, %v", k, err)
	}
}

// BenchmarkWrite5000 writes 5,000 leases once.
func BenchmarkWrite5000(b *testing.B) {
	s := state(b)
	peer := s.Entries[1]
	for i := range 5000 {
		peer.Key = fmt.Sprintf("10.%d.%d.0-24", i/250, i%250)
		s.Entries = append(s.Entries, subnet.NewEntry(peer))
	}
	c := NewCopy(filepath.Join(b.TempDir(), "snapshot.json"), slog.New(slog.DiscardHandler))
	for b.Loop() {
		if err := c.Write(s); err != nil {
			b.Fatal(err)
		}
	}
	if info, err := os.Stat(c.name); err == nil {
		b.ReportMetric(float64(info.Size()), "bytes")
	}
}
