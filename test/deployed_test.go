package test

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"culvert/internal/lab"
)

// exit waits until a program that must fail exits, and returns the last line that it
// printed.
func exit(t *testing.T, p *lab.Process, within time.Duration) string {
	t.Helper()
	select {
	case <-p.Exited():
	case <-time.After(within):
		t.Fatalf("still running after %s: %s", within, p.Tail(3))
	}
	if p.Err() == nil {
		t.Error("it exited without an error")
	}
	lines := strings.Split(strings.TrimSpace(p.Tail(3)), "\n")
	return lines[len(lines)-1]
}

// TestU9SecondDaemonIsRefused starts a second daemon in a network namespace. Two would
// undo each other's changes, so it exits with an error that names the first, and so does
// `culvert cleanup`.
func TestU9SecondDaemonIsRefused(t *testing.T) {
	c := newCluster(t, 1)
	c.setConfig(config)
	n := c.Nodes[0]
	first := c.start(n)
	c.waitReady(n, 0)
	second := c.start(n, "--node-id", "other", "--run-dir", t.TempDir(), "--etcd-prefix", "/b", "--metrics", "")
	said := exit(t, second, 5*time.Second)
	for _, want := range []string{fmt.Sprintf("pid %d", first.PID), "node " + n.ID, "run directory " + n.RunDir, "stop it first"} {
		if !strings.Contains(said, want) {
			t.Errorf("the second daemon printed %q, want %q in it", said, want)
		}
	}
	cleanup, err := n.Start(lab.Command{Name: "cleanup", Path: filepath.Join(c.bin, "culvert"), Args: []string{"cleanup"}})
	if err != nil {
		t.Fatal(err)
	}
	if said := exit(t, cleanup, 5*time.Second); !strings.Contains(said, n.ID) || !strings.Contains(said, "--force") {
		t.Errorf("cleanup printed %q", said)
	}
	if s := c.waitReady(n, 0); len(s.Datapath.Repairs) != 0 {
		t.Errorf("the first daemon had to repair %v", s.Datapath.Repairs)
	}
	// The kernel releases the lock even if the first daemon is killed.
	if err := first.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-first.Exited()
	c.start(n)
	c.waitReady(n, 0)
}

// TestP10DaemonsAtOneMoment starts two daemons at the same time, in one namespace or with
// one run directory: exactly one runs.
func TestP10DaemonsAtOneMoment(t *testing.T) {
	c := newCluster(t, 2)
	c.setConfig(config)
	shared := t.TempDir()
	for name, start := range map[string]func(i int) *lab.Process{
		"namespace": func(i int) *lab.Process {
			return c.start(c.Nodes[0], "--run-dir", filepath.Join(shared, fmt.Sprint(i)), "--metrics", "")
		},
		"run directory": func(i int) *lab.Process { return c.start(c.Nodes[i], "--run-dir", shared, "--metrics", "") },
	} {
		t.Run(name, func(t *testing.T) {
			for range 8 {
				p := []*lab.Process{start(0), start(1)}
				var refused, runs *lab.Process
				select {
				case <-p[0].Exited():
					refused, runs = p[0], p[1]
				case <-p[1].Exited():
					refused, runs = p[1], p[0]
				case <-time.After(5 * time.Second):
					t.Error("both run")
					refused, runs = p[0], p[1]
					_ = refused.Kill()
				}
				select {
				case <-runs.Exited():
					t.Errorf("neither runs: %s and %s", runs.Tail(1), refused.Tail(1))
				case <-time.After(200 * time.Millisecond):
				}
				if err := runs.Stop(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestD9WithoutRights starts a daemon without CAP_NET_ADMIN: it exits before it takes a
// lease.
func TestD9WithoutRights(t *testing.T) {
	c := newCluster(t, 1)
	c.setConfig(config)
	p, err := c.Nodes[0].Start(lab.Command{Name: "unprivileged", Path: "/usr/bin/setpriv", Args: []string{
		"--bounding-set=-net_admin", "--inh-caps=-net_admin", filepath.Join(c.bin, "culvert"),
		"run", "--node-id", "n1", "--run-dir", t.TempDir(), "--etcd-endpoints", c.endpoint,
	}})
	if err != nil {
		t.Fatal(err)
	}
	if said := exit(t, p, 3*time.Second); !strings.Contains(said, "CAP_NET_ADMIN") || !strings.Contains(said, "as root") {
		t.Errorf("the daemon printed %q", said)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if found, err := c.client().Get(ctx, "/coreos.com/network/subnets/10", clientv3.WithPrefix()); err != nil || len(found.Kvs) != 0 {
		t.Errorf("a lease was taken: %v %v", found, err)
	}
}

// TestFirstContact checks the errors that new users see first: one line that says what to
// do, within 3 s.
func TestFirstContact(t *testing.T) {
	c := newCluster(t, 1)
	n := c.Nodes[0]
	var taken net.Listener
	if err := n.Do(func() (err error) {
		taken, err = net.Listen("tcp", "127.0.0.1:9999")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for _, m := range []struct {
		name string
		args []string
		says []string
	}{
		{"no etcd", []string{"lease", "list", "--etcd-endpoints", "http://127.0.0.1:1"}, []string{"connection refused: is etcd running there"}},
		{"no configuration", []string{"config", "show", "--etcd-endpoints", c.endpoint}, []string{"culvert config init"}},
		{"no daemon", []string{"status", "--run-dir", t.TempDir()}, []string{"is `culvert run` running"}},
		{"metrics port taken", []string{"run", "--node-id", "n1", "--run-dir", t.TempDir(), "--metrics", "127.0.0.1:9999", "--etcd-endpoints", c.endpoint}, []string{"127.0.0.1:9999", "take another address with --metrics"}},
	} {
		p, err := n.Start(lab.Command{Name: strings.ReplaceAll(m.name, " ", "-"), Path: filepath.Join(c.bin, "culvert"), Args: m.args})
		if err != nil {
			t.Fatal(err)
		}
		said := exit(t, p, 3*time.Second)
		for _, want := range m.says {
			if !strings.Contains(said, want) {
				t.Errorf("%s: printed %q, want %q in it", m.name, said, want)
			}
		}
	}
	// The daemon waits and reports what for.
	c.endpoint = "https://127.0.0.1:1"
	p := c.start(n)
	began := time.Now()
	eventually(t, "the status has the reason", func() error {
		s, err := c.status(n)
		if err == nil && !strings.Contains(s.NotReady, "connection refused: is etcd running there") {
			err = fmt.Errorf("not ready: %q", s.NotReady)
		}
		return err
	})
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("the status had the reason only after %s", took)
	}
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
}
