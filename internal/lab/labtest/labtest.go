// Package labtest lets tests run inside network namespaces.
package labtest

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"culvert/internal/lab"
)

// unavailable is why there are no namespaces here; empty if there are.
var unavailable string

// Main is the TestMain of a package whose tests use labs:
//
//	func TestMain(m *testing.M) { labtest.Main(m) }
//
// Without root it runs the test binary again in a user namespace. Where that
// is not possible the tests that call New or Need are skipped with the reason;
// in continuous integration (CI is set) the run fails instead.
func Main(m *testing.M) {
	code, again, err := lab.EnterUserNamespace()
	switch {
	case again:
		os.Exit(code)
	case err != nil && os.Getenv("CI") != "":
		fmt.Fprintf(os.Stderr, "FAIL: these tests need network namespaces: %v\n", err)
		os.Exit(1)
	case err != nil:
		unavailable = err.Error()
		fmt.Fprintf(os.Stderr, "SKIPPING the tests that need network namespaces: %s\n", unavailable)
	default:
		if _, err := lab.Sweep(); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	os.Exit(m.Run())
}

// Need skips the test if there are no network namespaces here.
func Need(tb testing.TB) {
	tb.Helper()
	if unavailable != "" {
		tb.Skip("needs network namespaces: " + unavailable)
	}
}

// NeedTUN skips the test if no TUN device can be made here; in continuous
// integration it fails.
func NeedTUN(tb testing.TB) {
	tb.Helper()
	Need(tb)
	if err := lab.CheckTUN(); err != nil {
		if os.Getenv("CI") != "" {
			tb.Fatal(err)
		}
		tb.Skip(err)
	}
}

// Long keeps the test out of the quick gate (go test -short, as `make check`
// runs it): `make test` runs it in full.
func Long(tb testing.TB) {
	tb.Helper()
	if testing.Short() {
		tb.Skip("too long for the quick gate: make test runs it")
	}
}

// New makes a lab that is removed when the test ends. If the test failed, the
// ends of its processes' logs are shown.
func New(tb testing.TB, o lab.Options) *lab.Lab {
	tb.Helper()
	Need(tb)
	l, err := lab.New(o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if tb.Failed() {
			for _, p := range l.Processes() {
				tb.Logf("%s (pid %d) said at the end:\n%s", p.Name, p.PID, p.Tail(30))
			}
		}
		if err := l.Close(); err != nil {
			tb.Errorf("removing the lab: %v", err)
		}
	})
	return l
}

// Bin returns the directory of culvert's programs, and fails the test if they
// were not built.
func Bin(tb testing.TB) string {
	tb.Helper()
	dir, err := lab.FindBin()
	if err != nil {
		tb.Fatal(err)
	}
	return dir
}

// StartEtcd starts the built culvert-etcd in the lab's fabric and returns its
// client URL, which every node reaches.
func StartEtcd(tb testing.TB, l *lab.Lab) (endpoint string) {
	tb.Helper()
	listen := netip.AddrPortFrom(l.FabricAddrs[0], 2379).String()
	p, err := l.Fabric.Start(lab.Command{
		Name: "etcd", Path: filepath.Join(Bin(tb), "culvert-etcd"),
		Args: []string{"--data-dir", filepath.Join(l.Dir, "etcd"), "--listen-client", listen, "--unsafe-no-fsync"},
	})
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(tb.Context(), 30*time.Second)
	defer cancel()
	if _, err := p.WaitLine(ctx, "ready "); err != nil {
		tb.Fatal(err)
	}
	return "http://" + listen
}
