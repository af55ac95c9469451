package load

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	Quiet(8) // otherwise raw system calls could block all of GOMAXPROCS
	goleak.VerifyTestMain(m)
}

var loopback = []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")}

// here is two near ends.
var here = []Place{Here{}, Here{}}

func openSession(t *testing.T, kind Kind, at netip.Addr) Session {
	t.Helper()
	s, err := Local{Here{}}.Open(t.Context(), Spec{Kind: kind, At: at, Near: len(here)})
	if err != nil {
		if at.Is6() {
			t.Skipf("no IPv6 on this machine: %v", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestStreams(t *testing.T) {
	for _, at := range loopback {
		for _, reverse := range []bool{false, true} {
			kind := Sink
			if reverse {
				kind = Source
			}
			far := openSession(t, kind, at)
			near, err := StartStreams(here, far.Addr(), 3, reverse)
			if err != nil {
				t.Fatal(err)
			}
			read := far.Reading
			if reverse {
				read = near.Reading
			}
			before, err := read()
			if err != nil {
				t.Fatal(err)
			}
			for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
				after, err := read()
				if err != nil {
					t.Fatal(err)
				}
				rate, _ := after.Since(before)
				if rate > 0 && after.Bytes-before.Bytes > 1e6 {
					break
				}
				if time.Now().After(end) {
					t.Errorf("%s reverse %t: %g bytes per second", at, reverse, rate)
					break
				}
			}
			if err := near.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestPacedDatagrams(t *testing.T) {
	far := openSession(t, Drain, loopback[0])
	const perSecond = 5000
	start := time.Now()
	near, err := StartDatagrams(here, far.Addr(), 100, perSecond)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond)
	took := time.Since(start)
	if err := near.Close(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond)
	got, err := far.Reading()
	if err != nil {
		t.Fatal(err)
	}
	if got.Packets != near.Sent() || got.Bytes != 100*near.Sent() {
		t.Errorf("%d sent, %+v received", near.Sent(), got)
	}
	if most := perSecond * (took.Seconds() + 0.2); float64(near.Sent()) > most || near.Sent() == 0 {
		t.Errorf("%d sent in %s at %d per second", near.Sent(), took, perSecond)
	}
	if got.First <= 0 || got.First > got.Nanoseconds {
		t.Errorf("the first datagram arrived at %d ns, and the reading is of %d ns", got.First, got.Nanoseconds)
	}
}

func TestRequestsAndConnections(t *testing.T) {
	for _, at := range loopback {
		far := openSession(t, Echo, at)
		took, err := Requests(t.Context(), here, far.Addr(), 10*time.Millisecond, 50*time.Millisecond)
		if err != nil || len(took) < 10 || took[0] <= 0 || took[0] > took[len(took)-1] {
			t.Fatalf("%d requests: %v", len(took), err)
		}
		far = openSession(t, Accept, at)
		perSecond, err := Connections(t.Context(), here, far.Addr(), 10*time.Millisecond, 100*time.Millisecond)
		if err != nil || perSecond < 10 {
			t.Errorf("%g per second: %v", perSecond, err)
		}
		r, err := far.Reading()
		if err != nil || float64(r.Packets) < perSecond*0.09 {
			t.Errorf("%g connections per second, but the far end counted %d: %v", perSecond, r.Packets, err)
		}
	}
}

func TestEndsWithContext(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	far := openSession(t, Echo, loopback[0])
	start := time.Now()
	if _, err := Requests(ctx, here, far.Addr(), 0, time.Minute); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	far = openSession(t, Accept, loopback[0])
	if _, err := Connections(ctx, here, far.Addr(), 0, time.Minute); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("it took %s", took)
	}
}

func TestClosedSession(t *testing.T) {
	s := openSession(t, Sink, loopback[0])
	to := s.Addr()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := StartStreams(here, to, 1, false); err == nil {
		t.Error("a stream to a closed session succeeded")
	}
	if _, err := Requests(t.Context(), here, to, 0, time.Second); err == nil {
		t.Error("requests to a closed session succeeded")
	}
	if _, err := (Local{Here{}}).Open(t.Context(), Spec{Kind: "teapot", At: loopback[0]}); err == nil {
		t.Error("Open accepted an unknown kind")
	}
}

func TestQuantile(t *testing.T) {
	var sorted []time.Duration
	for i := range 1000 {
		sorted = append(sorted, time.Duration(i+1))
	}
	for q, want := range map[float64]time.Duration{0: 1, 0.5: 501, 0.9: 901, 0.99: 991, 0.999: 1000, 1: 1000} {
		if got := Quantile(sorted, q); got != want {
			t.Errorf("quantile %g is %d", q, got)
		}
	}
	if got := Quantile(sorted[:1], 0.999); got != 1 {
		t.Errorf("of one value: %d", got)
	}
}
