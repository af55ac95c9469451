//go:build system

package system

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"culvert/internal/api"
	"culvert/internal/image"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

const pauseImage = "culvert.test/pause:1"

// writePauseImage builds the sandbox image from one static program.
func writePauseImage(t *testing.T, path string) {
	t.Helper()
	i := image.Image{Name: pauseImage, Files: map[string]string{"pause": buildTool(t, "./testdata/pause")}, Entrypoint: []string{"/pause"}}
	if err := image.Write(path, i); err != nil {
		t.Fatal(err)
	}
}

// machine is a node that runs Debian's containerd as a Kubernetes node does, in
// a mount namespace with its own /var/lib, and with all its other files below
// one directory.
type machine struct {
	t      *testing.T
	node   *lab.Node
	bin    string
	dir    string // root, state, /var/lib, plugins, configuration
	mounts *lab.Process
	engine *lab.Process
	starts int

	connection *grpc.ClientConn
	runtime    cri.RuntimeServiceClient
}

func newMachine(t *testing.T, n *lab.Node, bin string) *machine {
	t.Helper()
	dir, err := os.MkdirTemp("", "culvert-cri") // socket paths must be short
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, node: n, bin: bin, dir: dir}
	t.Cleanup(func() {
		m.powerOff()
		m.removeCgroups()
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
		_ = os.Remove("/run/containerd") // only if it is empty
	})
	for _, d := range []string{"varlib", "run", "bin", "net.d", "logs"} {
		if err := os.Mkdir(m.path(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// Debian's containerd is 1.6, which supports CNI 1.0.0.
	if out, err := exec.Command(filepath.Join(bin, "culvert"), "cni", "install", "--bin-dir", m.path("bin"),
		"--conf-dir", m.path("net.d"), "--subnet-file", n.SubnetFile()).CombinedOutput(); err != nil {
		t.Fatalf("culvert cni install: %v\n%s", err, out)
	}
	// The test machine may not allow lowering oom_score_adj, and overlayfs
	// cannot be stacked on overlayfs.
	config := `version = 2
root = "` + m.path("root") + `"
state = "` + m.path("state") + `"
[grpc]
  address = "` + m.path("s") + `"
[plugins."io.containerd.internal.v1.opt"]
  path = "` + m.path("opt") + `"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + pauseImage + `"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "` + m.path("bin") + `"
    conf_dir = "` + m.path("net.d") + `"
`
	if err := os.WriteFile(m.path("config.toml"), []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }

func (m *machine) start(name, path string, args ...string) *lab.Process {
	m.t.Helper()
	m.starts++
	p, err := m.node.Start(lab.Command{Name: fmt.Sprintf("%s-%s-%d", m.node.ID, name, m.starts), Path: path, Args: args})
	if err != nil {
		m.t.Fatal(err)
	}
	return p
}

// powerOn creates the mount namespace and starts containerd in it.
func (m *machine) powerOn() {
	m.t.Helper()
	m.mounts = m.start("mounts", "/usr/bin/unshare", "--mount", "sh", "-c",
		// Shims and runc use fixed names in /run/containerd.
		"mount --bind "+m.path("varlib")+" /var/lib && mkdir -p /run/containerd && mount --bind "+m.path("run")+" /run/containerd && echo mounted && exec sleep infinity")
	ctx, cancel := context.WithTimeout(m.t.Context(), 10*time.Second)
	defer cancel()
	if _, err := m.mounts.WaitLine(ctx, "mounted"); err != nil {
		m.t.Fatal(err)
	}
	m.startEngine()
}

func (m *machine) inMounts(command ...string) []string {
	return append([]string{fmt.Sprintf("--mount=/proc/%d/ns/mnt", m.mounts.PID)}, command...)
}

func (m *machine) startEngine() {
	m.t.Helper()
	m.engine = m.start("containerd", "/usr/bin/nsenter", m.inMounts("containerd", "--config", m.path("config.toml"))...)
	var err error
	if m.connection, err = grpc.NewClient("unix://"+m.path("s"), grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		m.t.Fatal(err)
	}
	m.runtime = cri.NewRuntimeServiceClient(m.connection)
	eventually(m.t, m.node.ID+": containerd is ready", func() error {
		ctx, cancel := context.WithTimeout(m.t.Context(), 2*time.Second)
		defer cancel()
		s, err := m.runtime.Status(ctx, &cri.StatusRequest{})
		if err != nil {
			return err
		}
		for _, c := range s.GetStatus().GetConditions() {
			if !c.GetStatus() {
				return fmt.Errorf("%s: %s", c.GetType(), c.GetMessage())
			}
		}
		return nil
	})
}

func (m *machine) stopEngine() {
	m.t.Helper()
	_ = m.connection.Close()
	if err := m.engine.Stop(); err != nil {
		m.t.Error(err)
	}
}

// powerOff kills everything at once, like a power failure: containerd, the
// shims and their children; the mounts go with the last process.
func (m *machine) powerOff() {
	if m.mounts == nil {
		return
	}
	if m.connection != nil {
		_ = m.connection.Close()
	}
	own, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", m.mounts.PID))
	if err != nil {
		m.t.Error(err)
		return
	}
	if m.engine != nil {
		if err := m.engine.Kill(); err != nil {
			m.t.Error(err)
		}
	}
	// The shims are in the mount namespace. The sandboxes' processes have their
	// own mount namespaces and are children of the shims.
	parents := map[int]int{}
	var shims, doomed []int
	entries, err := os.ReadDir("/proc")
	if err != nil {
		m.t.Error(err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid)); err == nil && ns == own && pid != m.mounts.PID {
			shims = append(shims, pid)
		}
		if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil {
			fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
			if len(fields) > 1 {
				parents[pid], _ = strconv.Atoi(fields[1])
			}
		}
	}
	for pid, parent := range parents {
		if slices.Contains(shims, parent) {
			doomed = append(doomed, pid)
		}
	}
	for _, pid := range append(shims, doomed...) {
		_ = syscall.Kill(pid, syscall.SIGKILL) // it may have exited
	}
	for _, pid := range append(shims, doomed...) {
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err != nil || bytes.Contains(text, []byte(") Z ")) {
				break
			}
		}
	}
	if err := m.mounts.Kill(); err != nil {
		m.t.Error(err)
	}
	m.mounts, m.engine = nil, nil
}

// cgroup is the parent of the sandboxes' cgroups.
func (m *machine) cgroup() string { return "/" + filepath.Base(m.dir) }

// removeCgroups removes the cgroups left by powerOff, innermost first.
func (m *machine) removeCgroups() {
	parents, err := filepath.Glob("/sys/fs/cgroup/*" + m.cgroup())
	if err != nil {
		m.t.Error(err)
	}
	for _, parent := range append(parents, "/sys/fs/cgroup"+m.cgroup()) {
		var groups []string
		_ = filepath.WalkDir(parent, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				groups = append(groups, path)
			}
			return nil
		})
		slices.Reverse(groups)
		for _, g := range groups {
			if err := os.Remove(g); err != nil {
				m.t.Errorf("control group %s: %v", g, err)
			}
		}
	}
}

type sandboxPod struct {
	*lab.Namespace
	id   string
	addr netip.Addr
}

// run creates a pod sandbox, as kubelet does.
func (m *machine) run(name string, attempt uint32) sandboxPod {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), 60*time.Second)
	defer cancel()
	r, err := m.runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Uid: m.node.ID + name, Namespace: "default", Attempt: attempt},
		Hostname:     name,
		LogDirectory: m.path("logs"),
		Linux:        &cri.LinuxPodSandboxConfig{CgroupParent: m.cgroup()},
	}})
	if err != nil {
		m.t.Fatalf("%s: sandbox %s: %v", m.node.ID, name, err)
	}
	s, err := m.runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: r.GetPodSandboxId(), Verbose: true})
	if err != nil {
		m.t.Fatal(err)
	}
	var info struct{ Pid int }
	if err := json.Unmarshal([]byte(s.GetInfo()["info"]), &info); err != nil || info.Pid == 0 {
		m.t.Fatalf("the sandbox's process: %v in %v", err, s.GetInfo())
	}
	a, err := netip.ParseAddr(s.GetStatus().GetNetwork().GetIp())
	if err != nil {
		m.t.Fatal(err)
	}
	return sandboxPod{&lab.Namespace{Name: m.node.ID + "-" + name, Path: fmt.Sprintf("/proc/%d/ns/net", info.Pid)}, r.GetPodSandboxId(), a}
}

func (m *machine) remove(id string) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), 60*time.Second)
	defer cancel()
	if _, err := m.runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		m.t.Fatal(err)
	}
	if _, err := m.runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		m.t.Fatal(err)
	}
}

// sandboxes returns the IDs of the sandboxes in a state.
func (m *machine) sandboxes(state cri.PodSandboxState) []string {
	m.t.Helper()
	r, err := m.runtime.ListPodSandbox(m.t.Context(), &cri.ListPodSandboxRequest{})
	if err != nil {
		m.t.Fatal(err)
	}
	var ids []string
	for _, s := range r.GetItems() {
		if s.GetState() == state {
			ids = append(ids, s.GetId())
		}
	}
	return ids
}

// expect checks that host-local holds the pods' addresses, and the plugin their
// records.
func (m *machine) expect(when string, pods ...sandboxPod) {
	m.t.Helper()
	names := func(dir string) (out []string) {
		entries, _ := os.ReadDir(m.path(dir))
		for _, e := range entries {
			if n := e.Name(); !strings.HasPrefix(n, ".") && n != "lock" && !strings.HasPrefix(n, "last_") {
				out = append(out, n)
			}
		}
		slices.Sort(out)
		return out
	}
	var addrs, records []string
	for _, p := range pods {
		addrs, records = append(addrs, p.addr.String()), append(records, p.id+":eth0")
	}
	slices.Sort(addrs)
	slices.Sort(records)
	if got := names("varlib/cni/networks/culvert"); !slices.Equal(got, addrs) {
		m.t.Errorf("%s, %s: host-local holds %v, not %v", m.node.ID, when, got, addrs)
	}
	if got := names("varlib/cni/culvert"); !slices.Equal(got, records) {
		m.t.Errorf("%s, %s: the plugin remembers %v, not %v", m.node.ID, when, got, records)
	}
}

// TestContainerd runs pods through CRI, as Kubernetes does, on two nodes with
// daemons and containerd. containerd is restarted, and one node loses power:
//
//	n1: containerd ─ sandboxes a, b ─ cni0 ─ culvert ═══ culvert ─ cni0 ─ sandbox c ─ containerd :n2
func TestContainerd(t *testing.T) {
	labtest.NeedTUN(t)
	for _, program := range []string{"containerd", "runc", "ctr", "nsenter", "unshare"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Fatalf("%v: run make test-system, which installs it", err)
		}
	}
	bin := labtest.Bin(t)
	l := labtest.New(t, lab.Options{Nodes: 2})
	endpoint := labtest.StartEtcd(t, l)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := l.Fabric.Run(ctx, filepath.Join(bin, "culvert"), "config", "set",
		`{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}`, "--etcd-endpoints", endpoint); err != nil {
		t.Fatal(err)
	}
	pause := filepath.Join(t.TempDir(), "pause.tar")
	writePauseImage(t, pause)
	var machines []*machine
	daemon := func(m *machine, peers int) *lab.Process {
		n := m.node
		p := m.start("culvert", filepath.Join(bin, "culvert"), "run", "--node-id", n.ID, "--run-dir", n.RunDir, "--etcd-endpoints", endpoint)
		eventually(t, n.ID+" is ready", func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			s, err := api.GetStatus(ctx, n.RunDir)
			if err == nil && (!s.Ready || len(s.Peers) < peers) {
				err = fmt.Errorf("ready %t, %d peers", s.Ready, len(s.Peers))
			}
			return err
		})
		return p
	}
	var first *lab.Process
	for i, n := range l.Nodes {
		m := newMachine(t, n, bin)
		machines = append(machines, m)
		p := daemon(m, i)
		if first == nil {
			first = p
		}
		m.powerOn()
		if _, err := n.Run(ctx, "nsenter", m.inMounts("ctr", "--address", m.path("s"), "--namespace", "k8s.io", "images", "import", "--snapshotter", "native", pause)...); err != nil {
			t.Fatal(err)
		}
	}
	m, other := machines[0], machines[1]
	a, b, c := m.run("a", 0), m.run("b", 0), other.run("c", 0)
	m.expect("with pods", a, b)
	other.expect("with a pod", c)
	talk := func(when string, pods ...sandboxPod) {
		t.Helper()
		for _, p := range pods {
			// A node that has just joined is reachable after a moment.
			eventually(t, fmt.Sprintf("%s: %s reaches %s", when, p.Name, c.Name), func() error {
				ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
				defer cancel()
				_, err := p.Ping(ctx, p.addr, c.addr)
				return err
			})
		}
	}
	talk("at first", a, b)

	m.stopEngine()
	talk("without containerd", a)
	m.startEngine()
	if got := m.sandboxes(cri.PodSandboxState_SANDBOX_READY); len(got) != 2 {
		t.Errorf("after a restart of containerd %d sandboxes are ready", len(got))
	}
	m.remove(b.id)
	m.expect("after the restart and a removal", a)
	talk("after the restart", a)
	b = m.run("b", 1)
	m.expect("with both again", a, b)

	// Power failure: /var/lib and containerd's root survive, /run and the
	// kernel's state do not.
	m.powerOff()
	if err := first.Kill(); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{m.path("state"), m.path("run"), m.node.RunDir} {
		if err := os.RemoveAll(d); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{m.path("run"), m.node.RunDir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, link := range []string{"cni0", "culvert0"} {
		// The daemon's device disappeared with the daemon.
		if _, err := m.node.Run(ctx, "ip", "link", "delete", link); err != nil && link == "cni0" {
			t.Fatal(err)
		}
	}
	daemon(m, 1)
	m.powerOn()
	m.expect("after the reboot", a, b)
	dead := m.sandboxes(cri.PodSandboxState_SANDBOX_NOTREADY)
	if len(dead) != 2 {
		t.Errorf("after the reboot %d sandboxes are there and dead", len(dead))
	}
	a2, b2 := m.run("a", 1), m.run("b", 2)
	for _, id := range dead {
		m.remove(id)
	}
	m.expect("after kubelet made the pods anew", a2, b2)
	talk("after the reboot", a2, b2)

	m.remove(a2.id)
	m.remove(b2.id)
	other.remove(c.id)
	m.expect("at the end")
	other.expect("at the end")
}
