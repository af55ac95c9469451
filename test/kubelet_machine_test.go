//go:build kubernetes

package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"culvert/internal/image"
	"culvert/internal/lab"
	"culvert/subnet/kube/kubetest"
)

const (
	pauseImage   = "culvert.test/pause:1"
	webImage     = "culvert.test/web:1"
	culvertImage = "docker.io/library/culvert:v0.1.0" // culvert:v0.1.0, as the manifests have it
)

// kubelets is a Kubernetes cluster with everything that runs on its machines: the control
// plane in the lab's fabric, and on each node Debian's containerd, a kubelet and a
// kube-proxy.
type kubelets struct {
	*kubernetes
	dir      string // files that survive a reboot of the hosts, and the images
	machines []*machine
	figures  []string
}

// machine is a host of the cluster. Its processes are in their own PID namespace: when
// its first process ends, all do, as in a power failure.
type machine struct {
	*lab.Node
	k       *kubelets
	dir     string       // its disk: /var/lib, /var/log, /opt and /etc/cni
	unit    *lab.Process // unshare, which ends with the first process
	pid     int          // of the first process
	kubelet *lab.Process
	conn    *grpc.ClientConn
	cri     cri.RuntimeServiceClient
}

// join goes through the roots of the control groups, of which there are many in
// version 1. On the host its own group is each one's root.
const join = `set -e
groups=/sys/fs/cgroup
[ -e $groups/cgroup.procs ] || groups="$groups/*"
for g in $groups; do
	[ -L $g ] && continue
`

// enter puts a process into a group that no other group is in: in version 2 a
// group has either processes or groups.
const enter = `[ ! -e $g/cgroup.controllers ] || { g=$g/init; mkdir -p $g; }
	echo 0 >$g/cgroup.procs
`

// boot is what a host's first process does before it waits for orphans: the
// disk's directories, a new /run and its own control groups take the place of
// this machine's.
const boot = join + `
	mkdir $g/$CGROUP
	for f in cpuset.cpus cpuset.mems; do
		[ -e $g/cgroup.controllers ] || [ ! -e $g/$f ] || cat $g/$f >$g/$CGROUP/$f
	done
	echo 0 >$g/$CGROUP/cgroup.procs
done
exec unshare --cgroup /bin/sh -c "$SECOND"
`

const secondBoot = join + `
	mount --bind $g/$CGROUP $g
	` + enter + `
done
mount --bind "$DISK/lib" /var/lib
mount --bind "$DISK/log" /var/log
mount --bind "$DISK/opt" /opt
mount --bind "$DISK/cni" /etc/cni
mkdir -p /var/lib/kubelet
mount --bind /var/lib/kubelet /var/lib/kubelet
mount --make-shared /var/lib/kubelet
mount -t tmpfs tmpfs "$DISK/run"
cd "$DISK/run"
mkdir culvert files programs
mount --bind "$RUN_DIR" culvert
mount --bind "$FILES" files
mount --bind "$PROGRAMS" programs
mount --rbind "$DISK/run" /run
cd /
echo booted
while :; do sleep 3600 & wait; done
`

// containerd 1.6 is Debian's. This machine may not lower oom_score_adj, and
// overlayfs may not lie on overlayfs.
const containerdConfig = `version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + pauseImage + `"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
`

const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
failCgroupV1: false
failSwapOn: false
localStorageCapacityIsolation: false
maxPods: 200
evictionHard: {memory.available: 1Mi}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
volumePluginDir: /var/lib/kubelet/volume-plugins
`

const kubeconfig = `{"current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
"clusters": [{"name": "c", "cluster": {"server": "%s", "certificate-authority": "apiserver.crt"}}],
"users": [{"name": "u", "user": {"token": "%s"}}]}`

// newKubelets starts the control plane and the hosts, and returns when every
// Node is registered. No pod network is applied.
func newKubelets(t *testing.T, nodes int) *kubelets {
	t.Helper()
	for _, program := range []string{"containerd", "runc", "ctr", "nsenter", "unshare", "iptables", "nft"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Fatalf("%v: run make test-kubernetes, which installs it", err)
		}
	}
	k := &kubelets{dir: newDisks(t)}
	k.writeImages(t)
	k.kubernetes = newAPI(t, nodes, "--endpoint-reconciler-type=lease", "--kubelet-preferred-address-types=InternalIP")
	t.Cleanup(k.explain)
	k.write("containerd.toml", containerdConfig)
	k.write("kubelet.yaml", kubeletConfig)
	config := k.write("admin.kubeconfig", fmt.Sprintf(kubeconfig, k.server, kubetest.AdminToken))
	for name, args := range map[string][]string{
		"kube-controller-manager": {
			"--allocate-node-cidrs", "--cluster-cidr=10.244.0.0/16", "--service-cluster-ip-range=10.96.0.0/16", "--root-ca-file=" + filepath.Join(k.files, "apiserver.crt"),
			"--service-account-private-key-file=" + filepath.Join(k.files, "service-account.pem"),
		},
		"kube-scheduler": nil,
	} {
		if _, err := k.Fabric.Start(lab.Command{
			Name: name, Path: kubetest.Program(t, name), Args: append([]string{"--kubeconfig=" + config, "--leader-elect=false", "--bind-address=127.0.0.1", "--cert-dir=" + t.TempDir()}, args...),
		}); err != nil {
			t.Fatal(err)
		}
	}
	if os.Mkdir("/etc/cni", 0o755) == nil { // something to mount over
		t.Cleanup(func() { _ = os.Remove("/etc/cni") })
	}
	for _, n := range k.Nodes {
		h := &machine{Node: n, k: k, dir: filepath.Join(k.dir, n.ID)}
		for _, d := range []string{"lib", "log", "opt", "cni", "run"} {
			if err := os.MkdirAll(filepath.Join(h.dir, d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		k.machines = append(k.machines, h)
		t.Cleanup(h.powerOff)
		h.powerOn()
	}
	for _, h := range k.machines {
		k.within(time.Minute, "wait", "--for=create", "node/"+h.ID)
		k.within(time.Minute, "wait", "--for=jsonpath={.spec.podCIDR}", "node/"+h.ID)
	}
	return k
}

// newDisks makes a directory that is removed with the test, and removes those of
// test runs that were killed. Control groups are named after it.
func newDisks(t *testing.T) string {
	t.Helper()
	old, err := filepath.Glob(filepath.Join(os.TempDir(), "culvert-kubelets*"))
	if err != nil {
		t.Fatal(err)
	}
	lock := func(dir string, how int) (*os.File, error) {
		f, err := os.Open(dir)
		if err != nil {
			return nil, err
		}
		return f, unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
	}
	for _, dir := range old {
		f, err := lock(dir, unix.LOCK_EX)
		if err == nil {
			removeCgroups(t, filepath.Base(dir))
			_ = os.RemoveAll(dir)
		}
		_ = f.Close()
	}
	dir, err := os.MkdirTemp("", "culvert-kubelets")
	if err != nil {
		t.Fatal(err)
	}
	mine, err := lock(dir, unix.LOCK_SH)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		defer mine.Close()
		removeCgroups(t, filepath.Base(dir))
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// removeCgroups removes the control groups that dead hosts leave, inner ones
// first. Their names begin with this one.
func removeCgroups(t testing.TB, name string) {
	t.Helper()
	parents, err := filepath.Glob("/sys/fs/cgroup/*/" + name + "*")
	if err != nil {
		t.Error(err)
	}
	unified, err := filepath.Glob("/sys/fs/cgroup/" + name + "*")
	if err != nil {
		t.Error(err)
	}
	for _, parent := range append(parents, unified...) {
		var groups []string
		_ = filepath.WalkDir(parent, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				groups = append(groups, path)
			}
			return nil
		})
		for _, g := range slices.Backward(groups) {
			if err := os.Remove(g); err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("control group %s: %v", g, err)
			}
		}
	}
}

// writeImages writes what the hosts import: culvert's as the Dockerfile has it,
// and the test's own.
func (k *kubelets) writeImages(t *testing.T) {
	t.Helper()
	web := filepath.Join(t.TempDir(), "web")
	build := exec.Command("go", "build", "-o", web, "./testdata/web")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	culvert, err := image.FromDockerfile("../Dockerfile", culvertImage)
	if err != nil {
		t.Fatal(err)
	}
	for file, i := range map[string]image.Image{
		"pause.tar":   {Name: pauseImage, Files: map[string]string{"pause": web}, Entrypoint: []string{"/pause"}},
		"web.tar":     {Name: webImage, Files: map[string]string{"web": web}, Entrypoint: []string{"/web"}},
		"culvert.tar": culvert,
	} {
		if err := image.Write(filepath.Join(k.dir, file), i); err != nil {
			t.Fatal(err)
		}
	}
}

// within runs a kubectl that waits for a condition.
func (k *kubelets) within(atMost time.Duration, args ...string) {
	k.t.Helper()
	if out, err := k.kubectlFor(atMost+10*time.Second, append(args, fmt.Sprintf("--timeout=%v", atMost))...); err != nil {
		k.t.Fatalf("%v\n%s", err, out)
	}
}

// explain logs the cluster's state if the test has failed.
func (k *kubelets) explain() {
	if !k.t.Failed() {
		return
	}
	for _, args := range [][]string{
		{"get", "nodes,pods", "-A", "-o", "wide"},
		{"get", "events", "-A", "--sort-by=.lastTimestamp"},
	} {
		out, err := k.kubectlFor(20*time.Second, args...)
		k.t.Logf("kubectl %s (%v):\n%s", strings.Join(args, " "), err, out[max(0, len(out)-8000):])
	}
	for _, h := range k.machines {
		logs, _ := filepath.Glob(filepath.Join(h.dir, "log/pods/culvert_*/*/*.log"))
		for _, log := range logs {
			text, _ := os.ReadFile(log)
			k.t.Logf("%s: end of %s:\n%s", h.ID, filepath.Base(filepath.Dir(filepath.Dir(log))), text[max(0, len(text)-3000):])
		}
	}
}

// powerOn starts the host with what is on its disk.
func (h *machine) powerOn() {
	t := h.k.t
	t.Helper()
	h.k.starts++
	var err error
	h.unit, err = h.Start(lab.Command{
		Name: fmt.Sprintf("%s-boot-%d", h.ID, h.k.starts), Path: "/usr/bin/unshare",
		Args: []string{"--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "/bin/sh", "-c", boot},
		Env:  []string{"SECOND=" + secondBoot, "CGROUP=" + h.cgroup(), "DISK=" + h.dir, "RUN_DIR=" + h.RunDir, "FILES=" + h.k.files, "PROGRAMS=" + filepath.Dir(kubetest.Program(t, "kubelet"))},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := h.unit.WaitLine(ctx, "booted"); err != nil {
		t.Fatal(err)
	}
	children := childrenOf(h.unit.PID)
	if len(children) != 1 {
		t.Fatalf("%s: its first process is one of %v", h.ID, children)
	}
	h.pid = children[0]
	h.spawn("containerd", "containerd", "--config=/run/files/containerd.toml")
	if h.conn, err = grpc.NewClient("unix://"+h.path("/run/containerd/containerd.sock"), grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	h.cri = cri.NewRuntimeServiceClient(h.conn)
	eventually(t, h.ID+": containerd answers", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		_, err := h.cri.Status(ctx, &cri.StatusRequest{})
		return err
	})
	if _, err := os.Stat(filepath.Join(h.dir, "imported")); err != nil {
		for _, image := range []string{"pause.tar", "web.tar", "culvert.tar"} {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			_, err := h.Run(ctx, "nsenter", h.inside("ctr", "--namespace=k8s.io", "images", "import", "--snapshotter=native", filepath.Join(h.k.dir, image))...)
			cancel()
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(h.dir, "imported"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	h.startKubelet()
	h.spawn("kube-proxy", "/run/programs/kube-proxy", "--kubeconfig=/run/files/admin.kubeconfig", "--hostname-override="+h.ID, "--proxy-mode=iptables",
		// These settings are the host's; a network namespace cannot change them.
		"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0")
}

func (h *machine) startKubelet() {
	h.kubelet = h.spawn("kubelet", "/run/programs/kubelet", "--kubeconfig=/run/files/admin.kubeconfig", "--config=/run/files/kubelet.yaml",
		"--hostname-override="+h.ID, "--node-ip="+h.Addrs[0].String())
}

// restartKubelet ends the kubelet, whose pods run on, and starts it again.
func (h *machine) restartKubelet() {
	h.k.t.Helper()
	for _, pid := range childrenOf(h.kubelet.PID) { // of nsenter
		if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
			h.k.t.Fatal(err)
		}
	}
	select {
	case <-h.kubelet.Exited():
	case <-time.After(20 * time.Second):
		h.k.t.Fatalf("%s: its kubelet does not end", h.ID)
	}
	h.startKubelet()
}

// path returns the path by which the test reaches a file of the host.
func (h *machine) path(inside string) string { return fmt.Sprintf("/proc/%d/root%s", h.pid, inside) }

// inside returns the arguments of an nsenter that runs a command on the host. The caller
// is in the host's network namespace already.
func (h *machine) inside(command ...string) []string {
	return append([]string{
		"--target", strconv.Itoa(h.pid), "--mount", "--pid", "--cgroup", "--", "/bin/sh", "-c", join + enter + "done; exec \"$@\"", "sh",
	}, command...)
}

// spawn starts a program on the host.
func (h *machine) spawn(name string, command ...string) *lab.Process {
	h.k.t.Helper()
	h.k.starts++
	p, err := h.Start(lab.Command{Name: fmt.Sprintf("%s-%s-%d", h.ID, name, h.k.starts), Path: "/usr/bin/nsenter", Args: h.inside(command...)})
	if err != nil {
		h.k.t.Fatal(err)
	}
	return p
}

// powerOff kills everything that runs on the host at once.
func (h *machine) powerOff() {
	if h.unit == nil {
		return
	}
	_ = h.conn.Close()
	if err := h.unit.Kill(); err != nil {
		h.k.t.Error(err)
	}
	// Its first process is killed with it, and ends after all others.
	alive := func() bool {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", h.pid))
		return err == nil && !strings.Contains(string(text), ") Z ")
	}
	for end := time.Now().Add(20 * time.Second); alive() && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	if alive() {
		h.k.t.Errorf("%s: process %d has not ended", h.ID, h.pid)
	}
	h.unit = nil
	removeCgroups(h.k.t, h.cgroup())
}

func (h *machine) cgroup() string { return filepath.Base(h.k.dir) + "-" + h.ID }

// reboot powers the host off and on again: the disk's contents stay; /run and the
// kernel's network state are lost.
func (h *machine) reboot() {
	t := h.k.t
	t.Helper()
	h.powerOff()
	entries, err := os.ReadDir(h.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(h.RunDir, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for _, l := range h.links() {
		_, _ = h.Run(ctx, "ip", "link", "delete", l) // a pod's ends with the pod
	}
	if _, err := h.Run(ctx, "nft", "flush", "ruleset"); err != nil {
		t.Fatal(err)
	}
	if err := h.SetSysctl("net/ipv4/ip_forward", "0"); err != nil {
		t.Fatal(err)
	}
	h.powerOn()
}

// links returns the names of the host's links except lo and the underlay's.
func (h *machine) links() (names []string) {
	t := h.k.t
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	out, err := h.Run(ctx, "ip", "-json", "link")
	if err != nil {
		t.Fatal(err)
	}
	var links []struct {
		Name string `json:"ifname"`
	}
	if err := json.Unmarshal(out, &links); err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if l.Name != "lo" && l.Name != h.Link {
			names = append(names, l.Name)
		}
	}
	return names
}

func childrenOf(pid int) (pids []int) {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	for _, word := range strings.Fields(string(text)) {
		if child, err := strconv.Atoi(word); err == nil {
			pids = append(pids, child)
		}
	}
	return pids
}

// namespace returns a running pod's network namespace.
func (h *machine) namespace(pod string) *lab.Namespace {
	t := h.k.t
	t.Helper()
	var path string
	eventually(t, h.ID+": the sandbox of "+pod, func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		list, err := h.cri.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{
			State:         &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_READY},
			LabelSelector: map[string]string{"io.kubernetes.pod.name": pod},
		}})
		if err != nil || len(list.GetItems()) != 1 {
			return fmt.Errorf("%d sandboxes: %w", len(list.GetItems()), err)
		}
		s, err := h.cri.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: list.GetItems()[0].GetId(), Verbose: true})
		if err != nil {
			return err
		}
		var info struct {
			RuntimeSpec struct {
				Linux struct{ Namespaces []struct{ Type, Path string } }
			}
		}
		if err := json.Unmarshal([]byte(s.GetInfo()["info"]), &info); err != nil {
			return err
		}
		for _, ns := range info.RuntimeSpec.Linux.Namespaces {
			if ns.Type == "network" && ns.Path != "" {
				path = strings.TrimPrefix(ns.Path, "/var")
				return nil
			}
		}
		return errors.New("it names no network namespace")
	})
	return &lab.Namespace{Name: h.ID + "-" + pod, Path: h.path(path)}
}

// reserved returns the addresses that host-local has assigned in a network.
func (h *machine) reserved(network string) (addrs []string) {
	entries, _ := os.ReadDir(filepath.Join(h.dir, "lib/cni/networks", network))
	for _, e := range entries {
		if e.Name() != "lock" && !strings.HasPrefix(e.Name(), "last_") {
			addrs = append(addrs, e.Name())
		}
	}
	slices.Sort(addrs)
	return addrs
}
