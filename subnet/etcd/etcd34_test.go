package etcd

import (
	"context"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"culvert/subnet/etcd/etcdtest"
)

// oldest starts etcd 3.4: the program that CULVERT_OLD_ETCD names, or Debian's
// etcd-server (installed by make test-system). It returns the URL and a function
// that restarts the server.
func oldest(t *testing.T) (url string, restart func()) {
	t.Helper()
	program := os.Getenv("CULVERT_OLD_ETCD")
	if program == "" {
		program = "/usr/bin/etcd"
	}
	if _, err := os.Stat(program); err != nil {
		if os.Getenv("CULVERT_FULL") != "" {
			t.Fatalf("%v: the package etcd-server is missing", err)
		}
		t.Skip("needs Debian's etcd-server, which make test-system installs")
	}
	addresses := make([]string, 2)
	for i := range addresses {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addresses[i] = "http://" + l.Addr().String()
		_ = l.Close()
	}
	dir := t.TempDir()
	var cmd *exec.Cmd
	stop := func() {
		if cmd != nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	start := func() {
		cmd = exec.Command(program, "--data-dir", dir, "--log-level", "error", "--unsafe-no-fsync",
			"--listen-client-urls", addresses[0], "--advertise-client-urls", addresses[0],
			"--listen-peer-urls", addresses[1], "--initial-advertise-peer-urls", addresses[1], "--initial-cluster", "default="+addresses[1])
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "etcd", func() bool {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			c, err := clientv3.New(clientv3.Config{Endpoints: addresses[:1], Context: ctx})
			if err != nil {
				return false
			}
			defer c.Close()
			_, err = c.Get(ctx, "x")
			return err == nil || tokenRejected(err)
		})
	}
	t.Cleanup(func() { stop() })
	start()
	return addresses[0], func() { stop(); start() }
}

// etcd 3.4 checks the token of Authenticate requests too, so the client must not
// send an invalid one there.
func TestAuthenticationWithEtcd34(t *testing.T) {
	t.Parallel()
	url, restart := oldest(t)
	etcdtest.Secure(t, url)
	asUser := func(o *Options) { o.User, o.Password = "culvert", etcdtest.Password }
	began := time.Now()
	r := open(t, url, asUser)
	if _, _, err := r.ConfigText(t.Context()); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("the first response took %s", took)
	}
	r, l, w := ready(t, url, asUser)
	lost := hold(t, r, l)
	stands(t, r, l, lost)
	// A restart invalidates all tokens.
	restart()
	put(t, r, "subnets/10.5.1.0-24", peerValue(1))
	eventually(t, "a peer after the restart", func() bool { return len(w.last().Peers) == 1 })
	stands(t, r, l, lost)
	if err := r.Release(t.Context(), l); err != nil {
		t.Error(err)
	}
}
