package remedy

import (
	"errors"
	"fmt"
	"io"
	"testing"
)

func TestSplit(t *testing.T) {
	taken := Errorf("take another with --port", "port %d is taken: %w", 53, io.EOF)
	for _, c := range []struct {
		err      error
		what, do string
	}{
		{io.EOF, "EOF", ""},
		{taken, "port 53 is taken: EOF", "take another with --port"},
		{fmt.Errorf("open the tunnel: %w", taken), "open the tunnel: port 53 is taken: EOF", "take another with --port"},
		{fmt.Errorf("%w (of eth0)", taken), "port 53 is taken: EOF (of eth0)", "take another with --port"},
		{fmt.Errorf("no tunnel %w", errors.Join(io.ErrNoProgress, taken)), "no tunnel multiple Read calls return no data or error\nport 53 is taken: EOF", "take another with --port"},
	} {
		if what, do := Split(c.err); what != c.what || do != c.do {
			t.Errorf("%v: got %q and %q", c.err, what, do)
		}
	}
	if !errors.Is(taken, io.EOF) || taken.Error() != "port 53 is taken: EOF: take another with --port" {
		t.Errorf("%v", taken)
	}
}
