//go:build system

// Package system holds the tests that need other software: a container engine,
// containerd, a browser, the CNI project's tools.
package system

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// engine is a container engine inside a node: host networking in a container is
// that of the node.
type engine struct {
	t      *testing.T
	socket string
}

func startEngine(t *testing.T, l *lab.Lab, n *lab.Node) engine {
	t.Helper()
	dockerd, err := exec.LookPath("dockerd")
	if err != nil {
		t.Fatalf("%v: run make test-system, which installs it", err)
	}
	// The socket's path must be short.
	dir, err := os.MkdirTemp("", "culvert-engine")
	if err != nil {
		t.Fatal(err)
	}
	e := engine{t, "unix://" + filepath.Join(dir, "s")}
	p, err := n.Start(lab.Command{Name: "dockerd", Path: dockerd, Args: []string{
		"--host", e.socket, "--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"),
		"--pidfile", filepath.Join(dir, "pid"), "--bridge", "none", "--iptables=false", "--ip6tables=false", "--storage-driver", "vfs",
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
		// The engine leaves its own network namespace mounted.
		_ = unix.Unmount(filepath.Join(dir, "exec", "netns", "default"), unix.MNT_DETACH)
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	eventually(t, "the container engine answers", func() error { return e.command("info").Run() })
	return e
}

func (e engine) command(args ...string) *exec.Cmd {
	return exec.Command("docker", append([]string{"--host", e.socket}, args...)...)
}

func (e engine) run(args ...string) string {
	e.t.Helper()
	out, err := e.command(args...).CombinedOutput()
	if err != nil {
		e.t.Fatalf("docker %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// TestImage builds the image and runs a node from it, next to a node that runs
// the binary. The plugin is installed from the image like in the DaemonSet's
// init container. Pods on both nodes reach each other.
func TestImage(t *testing.T) {
	labtest.NeedTUN(t)
	bin, err := lab.FindBin()
	if err != nil {
		t.Fatal(err)
	}
	plugins := t.TempDir()
	l := labtest.New(t, lab.Options{Nodes: 2})
	endpoint := labtest.StartEtcd(t, l)

	engine := startEngine(t, l, l.Nodes[0])
	engine.run("build", "--tag", "culvert:test", filepath.Dir(bin))
	stored, err := strconv.Atoi(strings.TrimSpace(engine.run("image", "inspect", "--format", "{{.Size}}", "culvert:test")))
	t.Logf("the image is stored as %d bytes", stored)
	if err != nil || stored > 40e6 {
		t.Errorf("the image is stored as %d bytes, %v", stored, err)
	}
	if out := engine.run("run", "--rm", "--network", "host", "culvert:test", "version"); !strings.HasPrefix(out, "culvert ") {
		t.Errorf("version: %s", out)
	}
	engine.run("run", "--rm", "--network", "host", "culvert:test",
		"config", "set", `{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}`, "--etcd-endpoints", endpoint)
	engine.run("run", "--rm", "--network", "none", "--volume", plugins+":/host", "culvert:test",
		"cni", "install", "--bin-dir", "/host/bin", "--conf-dir", "/host/net.d")
	for _, name := range []string{"bin/culvert-cni", "bin/bridge", "bin/host-local", "net.d/10-culvert.conflist"} {
		if _, err := os.Stat(filepath.Join(plugins, name)); err != nil {
			t.Errorf("the init container left no %s: %v", name, err)
		}
	}
	n := l.Nodes[0]
	engine.run("run", "--detach", "--name", "node", "--network", "host",
		// Only what the daemon needs: it enables packet forwarding.
		"--cap-drop", "ALL", "--cap-add", "NET_ADMIN", "--device", "/dev/net/tun", "--security-opt", "systempaths=unconfined",
		"--volume", n.RunDir+":"+n.RunDir,
		"culvert:test", "run", "--node-id", n.ID, "--run-dir", n.RunDir, "--etcd-endpoints", endpoint)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the container said:\n%s", engine.run("logs", "--tail", "30", "node"))
		}
		engine.run("stop", "node")
	})
	if _, err := l.Nodes[1].Start(lab.Command{
		Name: "n2", Path: filepath.Join(bin, "culvert"),
		Args: []string{"run", "--node-id", "n2", "--run-dir", l.Nodes[1].RunDir, "--etcd-endpoints", endpoint},
	}); err != nil {
		t.Fatal(err)
	}
	var pods []*lab.Pod
	for _, n := range l.Nodes {
		eventually(t, n.ID+" is ready", func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			s, err := api.GetStatus(ctx, n.RunDir)
			if err == nil && (!s.Ready || len(s.Peers) != 1) {
				err = os.ErrDeadlineExceeded
			}
			return err
		})
		pod, err := n.AddPod(t.Context(), "p1")
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, pod)
	}
	for i, p := range pods {
		other := pods[1-i]
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if _, err := p.Ping(ctx, p.Addr(true), other.Addr(true)); err != nil {
			t.Error(err)
		}
	}
}

func eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if err = try(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}
