// Package labtest connects package lab with package testing: a TestMain that gets the
// privileges for network namespaces, labs that are removed when a test ends, and the
// conditions under which tests are skipped. It holds no state but whether namespaces
// are available; the labs belong to package lab.
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

// unavailable is why network namespaces cannot be created; empty if they can.
var unavailable string

// Main is the TestMain of a package whose tests use labs:
//
//	func TestMain(m *testing.M) { labtest.Main(m) }
//
// Without root it re-executes the test binary in a user namespace. If that is not
// possible, the tests that call New or Need are skipped with the reason; if CI is
// set in the environment, the run fails instead.
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

// Need skips the test if network namespaces cannot be created.
func Need(tb testing.TB) {
	tb.Helper()
	if unavailable != "" {
		tb.Skip("needs network namespaces: " + unavailable)
	}
}

// NeedTUN skips the test if TUN devices cannot be created. If CI is set in the
// environment, the test fails instead.
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

// Long skips the test with -short, as in `make check`. `make test` runs it.
func Long(tb testing.TB) {
	tb.Helper()
	if testing.Short() {
		tb.Skip("too long for -short: make test runs it")
	}
}

// New creates a lab that is removed when the test ends. If the test failed, it logs
// the end of each process's log, and what the kernel counted as lost.
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
				tb.Logf("end of the log of %s (pid %d):\n%s", p.Name, p.PID, p.Tail(30))
			}
			for _, lost := range l.Losses() {
				tb.Logf("counted as lost: %s", lost)
			}
		}
		if err := l.Close(); err != nil {
			tb.Errorf("removing the lab: %v", err)
		}
	})
	return l
}

// Bin returns the directory of culvert's programs. It fails the test if they were
// not built.
func Bin(tb testing.TB) string {
	tb.Helper()
	dir, err := lab.FindBin()
	if err != nil {
		tb.Fatal(err)
	}
	return dir
}

// StartEtcd starts culvert-etcd in the lab's fabric and returns its client URL, which
// every node can reach.
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
