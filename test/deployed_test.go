package test

import (
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"culvert/internal/host"
	"culvert/internal/lab"
	"culvert/internal/names"
	"culvert/internal/testca"
	"culvert/subnet/etcd/etcdtest"
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
	return p.Tail(50)
}

// TestU9SecondDaemonIsRejected starts a second daemon in a network namespace. Two would
// undo each other's changes, so it exits with an error that names the first, and so does
// `culvert cleanup`.
func TestU9SecondDaemonIsRejected(t *testing.T) {
	c := newCluster(t, 1)
	c.setConfig(config)
	n := c.Nodes[0]
	first := c.start(n)
	c.waitReady(n, 0)
	second := c.start(n, "--node-id", "other", "--run-dir", t.TempDir(), "--etcd-prefix", "/b", "--metrics", "")
	said := exit(t, second, 30*time.Second)
	for _, want := range []string{fmt.Sprintf("pid %d", first.PID), "node " + n.ID, "run directory " + n.RunDir, "stop it first"} {
		if !strings.Contains(said, want) {
			t.Errorf("the second daemon printed %q, want %q in it", said, want)
		}
	}
	cleanup, err := n.Start(lab.Command{Name: "cleanup", Path: filepath.Join(c.bin, "culvert"), Args: []string{"cleanup"}})
	if err != nil {
		t.Fatal(err)
	}
	if said := exit(t, cleanup, 30*time.Second); !strings.Contains(said, n.ID) || !strings.Contains(said, "--force") {
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

// TestP10ConcurrentStarts starts two daemons at the same time, in one namespace or with
// one run directory: exactly one runs.
func TestP10ConcurrentStarts(t *testing.T) {
	t.Parallel()
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
				case <-time.After(30 * time.Second):
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
	if said := exit(t, p, 30*time.Second); !strings.Contains(said, "CAP_NET_ADMIN") || !strings.Contains(said, "as root") {
		t.Errorf("the daemon printed %q", said)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if found, err := c.client().Get(ctx, "/coreos.com/network/subnets/10", clientv3.WithPrefix()); err != nil || len(found.Kvs) != 0 {
		t.Errorf("a lease was taken: %v %v", found, err)
	}
}

// saysWhatAndFix checks the errors of a command that ended: a line that says what is wrong
// and one that says what to do, or where a daemon logs before it, these two at the end; and
// that no line comes twice.
func saysWhatAndFix(t *testing.T, name, said, what, fix string) {
	t.Helper()
	lines := strings.Split(strings.TrimRight(said, "\n"), "\n")
	seen := make(map[string]bool)
	for _, line := range lines {
		if _, text, ok := strings.Cut(line, " level="); ok {
			line = text // without the time
		}
		if seen[line] {
			t.Errorf("%s: printed twice: %q", name, line)
		}
		seen[line] = true
	}
	for len(lines) > 2 && (strings.HasPrefix(lines[0], "time=") || strings.HasPrefix(lines[0], "waiting for etcd at ")) {
		lines = lines[1:]
	}
	if len(lines) != 2 || !strings.HasPrefix(lines[0], "culvert: ") || !strings.Contains(lines[0], what) ||
		!strings.HasPrefix(lines[1], "     fix: ") || !strings.Contains(lines[1], fix) {
		t.Errorf("%s: printed\n%s\nwant a line with %q and a fix with %q", name, said, what, fix)
	}
}

// firstContact bounds each command: none of them waits for what will not come. The order
// of the lines is checked, not the time; this only keeps a command from waiting for ever.
const firstContact = 10 * time.Second

// TestFirstContact checks the errors that new users see first: one line that says what is
// wrong, one that says what to do.
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
	udp, err := n.ListenPacket(t.Context(), "udp", "0.0.0.0:8472")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	c.setConfig(config)
	if err := n.Do(func() error {
		return netlink.RouteAdd(&netlink.Route{Dst: host.IPNet(netip.MustParsePrefix("203.0.113.0/24")), Type: unix.RTN_UNREACHABLE})
	}); err != nil {
		t.Fatal(err)
	}
	run := func(more ...string) []string {
		return append([]string{"run", "--node-id", "n1", "--run-dir", t.TempDir(), "--metrics", "", "--etcd-endpoints", c.endpoint}, more...)
	}
	https := strings.Replace(c.endpoint, "http:", "https:", 1)
	tls, ca := tlsServer(t, n, "127.0.0.1:9998")
	ours, strangers := testca.New(t), testca.New(t)
	ours.IssueFor(t, "server", ours, c.FabricAddrs[0])
	strangers.Issue(t, "client", strangers)
	demanding := c.startEtcd("demanding", c.FabricAddrs[0].String()+":2479", "--cert-file", ours.Path("server.pem"), "--key-file", ours.Path("server-key.pem"), "--client-ca-file", ours.Path("ca.pem"))
	guarded := c.startEtcd("guarded", c.FabricAddrs[0].String()+":2579")
	etcdtest.Secure(t, guarded, grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) { return c.Fabric.Dial(ctx, "tcp", address) }))
	wrong := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(wrong, []byte("wrong\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, m := range []struct {
		name   string
		before string // a wrapper
		args   []string
		what   string
		fix    string
	}{
		{name: "no etcd", args: []string{"lease", "list", "--etcd-endpoints", "http://127.0.0.1:1"}, what: "connection refused", fix: "is etcd running there"},
		{name: "no route to etcd", args: []string{"config", "show", "--etcd-endpoints", "http://203.0.113.9:2379"}, what: "no route to host", fix: "ip route get"},
		{name: "no name of etcd", args: []string{"lease", "list", "--etcd-endpoints", "http://etcd.invalid:2379"}, what: "lookup etcd.invalid", fix: "/etc/resolv.conf"},
		{name: "a silent server", args: []string{"lease", "list", "--etcd-endpoints", "http://127.0.0.1:9999"}, what: "it accepts the connection and sends nothing", fix: "is this etcd's client port"},
		{name: "no address of etcd", args: []string{"lease", "list", "--etcd-endpoints", "http://127.0.0.1:2379/v2"}, what: "not a URL", fix: "such as http://10.0.0.1:2379"},
		{name: "no configuration", args: []string{"config", "show", "--etcd-endpoints", c.endpoint, "--etcd-prefix", "/none"}, what: "no network configuration yet at /none", fix: "culvert config init"},
		{name: "no configuration in JSON", args: []string{"config", "set", "{", "--etcd-endpoints", c.endpoint}, what: "not JSON", fix: "config init --print"},
		{name: "no daemon", args: []string{"status", "--run-dir", t.TempDir()}, what: "no daemon answers on ", fix: "is `culvert run` running"},
		{name: "no daemon with peers", args: []string{"peers", "--run-dir", t.TempDir()}, what: "no daemon answers on ", fix: "is `culvert run` running"},
		{name: "no daemon to ping from", args: []string{"ping", "--all", "--run-dir", t.TempDir()}, what: "no daemon answers on ", fix: "is `culvert run` running"},
		{name: "nothing to trace by", args: []string{"trace", "10.5.1.2", "10.5.2.2", "--run-dir", t.TempDir()}, what: "there is no copy of the leases", fix: "`culvert run`"},
		{name: "no such interface", args: run("--iface", "eth7"), what: "eth7", fix: "interfaces here: eth0 "},
		{name: "no run directory", args: run("--run-dir", "/proc/none"), what: "mkdir /proc/none", fix: "--run-dir"},
		{name: "metrics port taken", args: run("--metrics", "127.0.0.1:9999"), what: "127.0.0.1:9999", fix: "choose another address with --metrics"},
		{name: "tunnel port taken", args: run("--datapath", "userspace"), what: "UDP port 8472 is taken", fix: "ss -lunp"},
		{name: "https asked of http", args: []string{"lease", "list", "--etcd-endpoints", https}, what: "it does not use TLS", fix: "write http://"},
		{name: "http asked of https", args: []string{"lease", "list", "--etcd-endpoints", "http://" + tls}, what: "it requires TLS", fix: "write https://"},
		{name: "a certificate of nobody known", args: []string{"lease", "list", "--etcd-endpoints", "https://" + tls}, what: "certificate", fix: "--etcd-cafile"},
		{name: "no such CA file", args: []string{"lease", "list", "--etcd-endpoints", "https://" + tls, "--etcd-cafile", ca + ".none"}, what: ca + ".none: no such file", fix: "--etcd-cafile"},
		{name: "wrong password", args: []string{"lease", "list", "--etcd-endpoints", guarded, "--etcd-username", "culvert", "--etcd-password-file", wrong}, what: `rejects the user "culvert"`, fix: "set the right ones with --etcd-username"},
		{name: "no password", args: []string{"lease", "list", "--etcd-endpoints", guarded}, what: "requires authentication", fix: "set a user"},
		{name: "wrong client certificate", args: []string{"lease", "list", "--etcd-endpoints", demanding, "--etcd-cafile", ours.Path("ca.pem"), "--etcd-certfile", strangers.Path("client.pem"), "--etcd-keyfile", strangers.Path("client-key.pem")}, what: "rejects this client", fix: "--etcd-certfile"},
		{name: "no client certificate", args: []string{"lease", "list", "--etcd-endpoints", demanding, "--etcd-cafile", ours.Path("ca.pem")}, fix: "that it accepts with --etcd-certfile"},
		{name: "wrong CA", args: []string{"lease", "list", "--etcd-endpoints", demanding, "--etcd-cafile", strangers.Path("ca.pem")}, what: "not signed by the CA in " + strangers.Path("ca.pem"), fix: "--etcd-cafile"},
		{name: "no root", before: "--bounding-set=-net_admin --inh-caps=-net_admin", args: run(), what: "CAP_NET_ADMIN", fix: "as root"},
		{name: "no root to clean up", before: "--bounding-set=-net_admin --inh-caps=-net_admin", args: []string{"cleanup"}, what: "CAP_NET_ADMIN", fix: "as root"},
		{name: "no root to trace", before: "--bounding-set=-net_admin --inh-caps=-net_admin", args: []string{"trace", "10.5.1.2", "10.5.2.2"}, what: "CAP_NET_ADMIN", fix: "as root"},
	} {
		command := lab.Command{Name: strings.ReplaceAll(m.name, " ", "-"), Path: filepath.Join(c.bin, "culvert"), Args: m.args}
		if m.before != "" {
			command.Path, command.Args = "/usr/bin/setpriv", append(append(strings.Fields(m.before), command.Path), m.args...)
		}
		p, err := n.Start(command)
		if err != nil {
			t.Fatal(err)
		}
		saysWhatAndFix(t, m.name, exit(t, p, firstContact), m.what, m.fix)
	}
	// An old kernel, as a program with this personality(2) sees it.
	if out, err := n.Run(t.Context(), "/usr/bin/setarch", "--uname-2.6", filepath.Join(c.bin, "culvert"), "doctor", "--run-dir", t.TempDir(), "--no-cni"); err == nil || !strings.Contains(string(out), "is older than the versions that culvert is tested with") || !strings.Contains(string(out), "use Linux 5.10 or later") {
		t.Errorf("on an old kernel: %s (%v)", out, err)
	}
	// A route of culvert's own, as a network over etcd's address leaves it.
	if err := n.Do(func() error {
		return netlink.RouteAdd(&netlink.Route{Dst: host.IPNet(netip.MustParsePrefix("10.5.0.0/16")), Type: unix.RTN_UNREACHABLE, Protocol: names.RouteProtocol})
	}); err != nil {
		t.Fatal(err)
	}
	p, err := n.Start(lab.Command{Name: "cut-off", Path: filepath.Join(c.bin, "culvert"), Args: []string{"lease", "list", "--etcd-endpoints", "http://10.5.9.9:2379"}})
	if err != nil {
		t.Fatal(err)
	}
	saysWhatAndFix(t, "cut off by our own route", exit(t, p, firstContact), "culvert's own route to 10.5.0.0/16", "culvert cleanup")
	// A daemon that reaches another server refuses the network.
	p = c.start(n, "--etcd-endpoints", "http://10.5.9.9:2379")
	if said := exit(t, p, firstContact); !strings.Contains(said, "the etcd server 10.5.9.9 is in the cluster network 10.5.0.0/16") {
		t.Errorf("with an etcd server in the network: %q", said)
	}
	// A wrong password ends the daemon.
	c.endpoint = guarded
	p = c.start(n, "--etcd-username", "culvert", "--etcd-password-file", wrong)
	saysWhatAndFix(t, "a daemon with a wrong password", exit(t, p, firstContact), `rejects the user "culvert"`, "set the right ones with --etcd-username")
	// Otherwise the daemon waits and reports what for.
	for _, w := range []struct {
		endpoint string
		flags    []string
		says     string
	}{
		{"https://127.0.0.1:1", nil, "connection refused: is etcd running there"},
		{https, nil, "it does not use TLS: write http://"},
		{demanding, []string{"--etcd-cafile", ours.Path("ca.pem"), "--etcd-certfile", strangers.Path("client.pem"), "--etcd-keyfile", strangers.Path("client-key.pem")}, "rejects this client"},
	} {
		c.endpoint = w.endpoint
		p = c.start(n, w.flags...)
		eventually(t, "the status has the reason", func() error {
			s, err := c.status(n)
			if err == nil && !strings.Contains(s.NotReady, w.says) {
				err = fmt.Errorf("not ready: %q, want %q", s.NotReady, w.says)
			}
			return err
		})
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
	}
}

// startEtcd starts a further etcd on the fabric, and returns its URL.
func (c *cluster) startEtcd(name, address string, flags ...string) (url string) {
	c.t.Helper()
	p, err := c.Fabric.Start(lab.Command{
		Name: "etcd-" + name, Path: filepath.Join(c.bin, "culvert-etcd"),
		Args: append([]string{"--data-dir", filepath.Join(c.Dir, "etcd-"+name), "--listen-client", address, "--unsafe-no-fsync"}, flags...),
	})
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(c.t.Context(), 30*time.Second)
	defer cancel()
	line, err := p.WaitLine(ctx, "ready ")
	if err != nil {
		c.t.Fatal(err)
	}
	return strings.TrimPrefix(line, "ready ")
}

// tlsServer serves TLS in a node's namespace, with a certificate that nobody has
// signed but itself, and returns its address and the certificate's file.
func tlsServer(t *testing.T, n *lab.Node, at string) (address, ca string) {
	t.Helper()
	server := httptest.NewUnstartedServer(http.NotFoundHandler())
	_ = server.Listener.Close()
	l, err := n.Listen(t.Context(), "tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	server.Listener = l
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	ca = filepath.Join(t.TempDir(), "ca.pem")
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := os.WriteFile(ca, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return at, ca
}
