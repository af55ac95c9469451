package subnet_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"culvert/subnet"
)

func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b subnet.Backoff
		for next := 50 * time.Millisecond; ; next *= 2 {
			next = min(next, subnet.BackoffLimit)
			began := time.Now()
			if err := b.Wait(t.Context(), time.Second); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(began) - time.Second; took < next/2 || took > next {
				t.Errorf("waited %v, want %v to %v", took, next/2, next)
			}
			if next == subnet.BackoffLimit {
				break
			}
		}
		b.Reset()
		began := time.Now()
		if err := b.Wait(t.Context(), 0); err != nil || time.Since(began) > 50*time.Millisecond {
			t.Errorf("after a reset: waited %v, %v", time.Since(began), err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began = time.Now()
		if err := b.Wait(ctx, time.Hour); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second {
			t.Errorf("waited %v after the context ended: %v", time.Since(began), err)
		}
	})
}

// An outage is logged at once, then once a minute, and when it is over; so is the
// next one.
func TestOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		o := subnet.NewOutage(slog.New(slog.NewTextHandler(&log, nil)), "it answers again")
		o.Over()
		for range 2 {
			log.Reset()
			for range 121 { // two minutes
				o.Failed("it fails", errors.New("reason"))
				time.Sleep(time.Second)
			}
			o.Over()
			o.Over()
			text := log.String()
			if strings.Count(text, `msg="it fails" error=reason`) != 3 || strings.Count(text, `msg="it answers again" after=2m1s`) != 1 || strings.Count(text, "\n") != 4 {
				t.Errorf("logged:\n%s", text)
			}
		}
	})
}

func TestSignalAndLock(t *testing.T) {
	s := subnet.NewSignal()
	s.Raise()
	s.Raise()
	<-s
	select {
	case <-s:
		t.Error("two signals were received")
	default:
	}

	l := subnet.NewLock()
	release, err := l.Take(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.Take(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("took a locked lock: %v", err)
	}
	release()
	if _, err := l.Take(t.Context()); err != nil {
		t.Error(err)
	}
}
