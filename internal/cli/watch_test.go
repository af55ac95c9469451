package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"culvert/internal/api"
)

// TestShow plays frames of a command that is shown again and again, into a pipe: a later
// error is shown in its frame's place, the first one ends it.
func TestShow(t *testing.T) {
	play := func(out output, errs ...error) (string, error) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var b strings.Builder
		n := 0
		err := show(ctx, &b, time.Millisecond, out, func(_ context.Context, w io.Writer) error {
			if n == len(errs) {
				cancel()
				return ctx.Err()
			}
			n++
			fmt.Fprintln(w, "frame", n)
			return errs[n-1]
		})
		return b.String(), err
	}
	gone := errors.New("no daemon answers")
	text, err := play("table", nil, gone, nil)
	var lines []string
	for line := range strings.Lines(text) {
		if _, failed := time.Parse(time.RFC3339, strings.TrimSpace(line)); failed == nil {
			line = "TIME\n"
		}
		lines = append(lines, line)
	}
	if got, want := strings.Join(lines, ""), "TIME\nframe 1\n\nTIME\nframe 2\nno daemon answers; trying again\n\nTIME\nframe 3\n\n"; err != nil || got != want {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
	if text, err := play("json", nil, nil); err != nil || text != "frame 1\nframe 2\n" {
		t.Errorf("%q, %v", text, err)
	}
	if _, err := play("table", gone); !errors.Is(err, gone) {
		t.Errorf("%v", err)
	}
	if _, err := play("json", nil, gone); !errors.Is(err, gone) {
		t.Errorf("%v", err)
	}
}

// TestInPlace checks what a terminal is sent: no frame is longer or wider than it, and only the first
// clears it.
func TestInPlace(t *testing.T) {
	for _, c := range []struct {
		height int
		first  bool
		want   string
	}{
		{10, true, "\x1b[H\x1b[2Jone\x1b[K\ntwo\x1b[K\nthree\x1b[K\nsixteen…\x1b[K\nfive\x1b[K\n\x1b[J"},
		{6, false, "\x1b[Hone\x1b[K\ntwo\x1b[K\nthree\x1b[K\nsixteen…\x1b[K\nfive\x1b[K\n\x1b[J"},
		{5, false, "\x1b[Hone\x1b[K\ntwo\x1b[K\n... 2 m…\x1b[K\nfive\x1b[K\n\x1b[J"},
	} {
		if got := string(inPlace("one\ntwo\nthree\nsixteen characters\nfive\n", 8, c.height, c.first)); got != c.want {
			t.Errorf("%d rows: %q, want %q", c.height, got, c.want)
		}
	}
}

// TestChanges checks the rates of a status that is watched.
func TestChanges(t *testing.T) {
	c := changes{seconds: 2}
	if got, want := c.traffic(api.Traffic{Packets: 1000, Bytes: 1_450_000, Syscalls: 5}, api.Traffic{Packets: 300, Bytes: 450_000}), "1000 packets, 1.4 MB; 350 packets/s, 500.0 kB/s"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	got := c.drops([]api.Drop{{Reason: "no-peer", Packets: 5}, {Reason: "ttl", Packets: 2}, {Reason: "mtu", Packets: 1}}, []api.Drop{{Reason: "no-peer", Packets: 2}, {Reason: "ttl", Packets: 2}})
	if want := "no-peer 5 (+3), ttl 2, mtu 1 (+1)"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
