//go:build kubernetes

package test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
	"culvert/subnet"
	"culvert/subnet/kube/kubetest"
)

// kubernetes is a cluster with a real API server in its fabric and the shipped manifests
// applied. There is no kubelet: the test creates the Nodes and starts the daemons.
type kubernetes struct {
	*cluster
	server string // the API server's URL
	files  string // kubeconfigs, tokens, net-conf.json
	args   []string
	api    *lab.Process
}

func newKubernetes(t *testing.T, nodes int) *kubernetes {
	t.Helper()
	k := newAPI(t, nodes)
	k.kubectl("apply", "-f", "../deploy/kubernetes/culvert.yaml")
	k.kubectl("apply", "--dry-run=server", "-f", "../deploy/kubernetes/culvert-etcd.yaml")
	text := k.kubectl("get", "configmap", "culvert-config", "-n", "culvert", "-o", `jsonpath={.data.net-conf\.json}`)
	k.write("net-conf.json", text)
	return k
}

// newAPI starts an API server without any manifest; more are additional flags.
func newAPI(t *testing.T, nodes int, more ...string) *kubernetes {
	t.Helper()
	labtest.NeedTUN(t)
	l := labtest.New(t, lab.Options{Nodes: nodes})
	k := &kubernetes{cluster: &cluster{Lab: l, t: t, bin: labtest.Bin(t)}, files: t.TempDir()}
	k.endpoint = labtest.StartEtcd(t, l)
	at := netip.AddrPortFrom(l.FabricAddrs[0], 6443)
	k.server = "https://" + at.String()
	k.args = append(kubetest.Args(t, k.files, k.endpoint, at), more...)
	k.startAPI()
	return k
}

// startAPI starts the API server, for the first time or after it was killed, and waits
// until it is ready.
func (k *kubernetes) startAPI() {
	k.t.Helper()
	k.starts++
	p, err := k.Fabric.Start(lab.Command{Name: fmt.Sprintf("kube-apiserver-%d", k.starts), Path: kubetest.Program(k.t, "kube-apiserver"), Args: k.args})
	if err != nil {
		k.t.Fatal(err)
	}
	k.api = p
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(200 * time.Millisecond) {
		if _, err := k.tryKubectl("get", "--raw", "/readyz"); err == nil {
			return
		}
		if time.Now().After(deadline) {
			k.t.Fatalf("kube-apiserver is not ready:\n%s", p.Tail(30))
		}
	}
}

// kubectl runs kubectl as the administrator.
func (k *kubernetes) kubectl(args ...string) string {
	k.t.Helper()
	out, err := k.tryKubectl(args...)
	if err != nil {
		k.t.Fatal(err)
	}
	return out
}

func (k *kubernetes) tryKubectl(args ...string) (string, error) {
	return k.kubectlFor(30*time.Second, args...)
}

func (k *kubernetes) kubectlFor(atMost time.Duration, args ...string) (string, error) {
	// Also after the test, to say why it failed.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(k.t.Context()), atMost)
	defer cancel()
	out, err := k.Fabric.Run(ctx, kubetest.Program(k.t, "kubectl"), append([]string{
		"--server", k.server, "--token", kubetest.AdminToken, "--insecure-skip-tls-verify", "--kubeconfig=/dev/null", "--cache-dir", filepath.Join(k.files, "cache"),
	}, args...)...)
	return string(out), err
}

func (k *kubernetes) write(name, text string) string {
	k.t.Helper()
	path := filepath.Join(k.files, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		k.t.Fatal(err)
	}
	return path
}

// addNode creates a Node with a podCIDR, as the kubelet and the controller manager do.
func (k *kubernetes) addNode(name, podCIDR string, annotations map[string]string) {
	k.t.Helper()
	text, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Node", "metadata": map[string]any{"name": name, "annotations": annotations},
		"spec": map[string]any{"podCIDR": podCIDR, "podCIDRs": []string{podCIDR}},
	})
	if err != nil {
		k.t.Fatal(err)
	}
	k.kubectl("create", "-f", k.write(name+".json", string(text)))
}

// token requests a token of the service account that is bound to a Node, as the kubelet
// does.
func (k *kubernetes) token(node string) string {
	k.t.Helper()
	return strings.TrimSpace(k.kubectl("create", "token", "culvert", "-n", "culvert", "--bound-object-kind", "Node", "--bound-object-name", node))
}

// flags returns the flags of a node's daemon. files is the path at which the daemon sees
// k.files. The first call for a node creates its token and kubeconfig.
func (k *kubernetes) flags(n *lab.Node, files string) []string {
	k.t.Helper()
	config := n.ID + ".kubeconfig"
	if _, err := os.Stat(filepath.Join(k.files, config)); err != nil {
		k.write(n.ID+".token", k.token(n.ID))
		k.write(config, `{"current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
"clusters": [{"name": "c", "cluster": {"server": "`+k.server+`", "certificate-authority": "apiserver.crt"}}],
"users": [{"name": "u", "user": {"tokenFile": "`+n.ID+`.token"}}]}`)
	}
	return []string{"run", "--store=kubernetes", "--kubeconfig-file", filepath.Join(files, config), "--net-config-path", filepath.Join(files, "net-conf.json")}
}

// run starts a node's daemon.
func (k *kubernetes) run(n *lab.Node, more ...string) *lab.Process {
	k.t.Helper()
	k.starts++
	p, err := n.Start(lab.Command{
		Name: fmt.Sprintf("%s-%d", n.ID, k.starts), Path: filepath.Join(k.bin, "culvert"), Env: []string{"NODE_NAME=" + n.ID},
		Args: append(append(k.flags(n, k.files), "--run-dir", n.RunDir), more...),
	})
	if err != nil {
		k.t.Fatal(err)
	}
	return p
}

// replaced starts a successor of a node's daemon, which inherits the datapath. It expects
// that no ping is lost meanwhile.
func (k *kubernetes) replaced(n *lab.Node, old *lab.Process, from, to *lab.Pod, flags ...string) *lab.Process {
	k.t.Helper()
	pings := startPings(k.t, from, to)
	p := k.run(n, append(flags, "--replace")...)
	s := k.wait(n, "is ready after the handover", func(s api.Status) bool { return s.Ready && s.Handover != nil && s.Handover.PID == old.PID })
	<-old.Exited()
	if !s.Handover.Inherited || old.Err() != nil {
		k.t.Errorf("the handover is %+v, and the old daemon exited with %v", s.Handover, old.Err())
	}
	if sent, lost := pings.stop(); lost > 0 {
		k.t.Errorf("%d of %d pings were lost in the handover", lost, sent)
	}
	return p
}

// confined is a script that sets up the mounts and capabilities of the DaemonSet's
// container: a read-only image FROM scratch, with a read-only /proc/sys.
const confined = `set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$ROOT"
cd "$ROOT"
mkdir -p proc sys dev/net run/culvert host/proc/sys/net files
touch culvert dev/net/tun
mount --bind "$PROGRAM" culvert
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount --bind /proc/sys/net host/proc/sys/net
mount --bind /dev/net/tun dev/net/tun
mount --bind "$RUN_DIR" run/culvert
mount --bind "$FILES" files
mount -o remount,bind,ro files
mount -o remount,ro "$ROOT"
exec setpriv --bounding-set -all,+net_admin,+net_raw,+sys_chroot --inh-caps -all --no-new-privs chroot "$ROOT" /culvert "$@"
`

// runConfined starts a node's daemon with the mounts and capabilities of the container.
func (k *kubernetes) runConfined(n *lab.Node, more ...string) *lab.Process {
	k.t.Helper()
	k.starts++
	root := k.t.TempDir()
	p, err := n.Start(lab.Command{
		Name: fmt.Sprintf("%s-%d", n.ID, k.starts), Path: "/usr/bin/unshare",
		Env:  []string{"NODE_NAME=" + n.ID, "ROOT=" + root, "PROGRAM=" + filepath.Join(k.bin, "culvert"), "RUN_DIR=" + n.RunDir, "FILES=" + k.files},
		Args: append(append([]string{"--mount", "/bin/sh", "-c", confined, "sh"}, k.flags(n, "/files")...), more...),
	})
	if err != nil {
		k.t.Fatal(err)
	}
	return p
}

// TestKubernetes tests a cluster with the API server as its store: a userspace node, a
// kernel node confined as in the manifest, and a node with flannel.
//
//	pod ── n1 (userspace) ──┐                     ┌── kube-apiserver, etcd
//	pod ── n2 (kernel) ─────┼── underlay ── fabric
//	pod ── n3 (flannel) ────┘
func TestKubernetes(t *testing.T) {
	k := newKubernetes(t, 3)
	n1, n2, n3 := k.Nodes[0], k.Nodes[1], k.Nodes[2]

	flannel, err := n3.AddHandmadeVXLAN(lab.VXLANOptions{Subnet: netip.MustParsePrefix("10.244.3.0/24")})
	if err != nil {
		t.Fatal(err)
	}
	k.addNode("n1", "10.244.1.0/24", nil)
	k.addNode("n2", "10.244.2.0/24", nil)
	k.addNode("n3", "10.244.3.0/24", map[string]string{
		"flannel.alpha.coreos.com/kube-subnet-manager": "true", "flannel.alpha.coreos.com/backend-type": "vxlan",
		"flannel.alpha.coreos.com/public-ip":    n3.Addrs[0].String(),
		"flannel.alpha.coreos.com/backend-data": fmt.Sprintf(`{"VNI":1,"VtepMAC":"%s"}`, flannel.Self.VTEP.MAC),
	})
	began := time.Now()
	first := k.run(n1, "--datapath=userspace")
	k.runConfined(n2, "--datapath=kernel")
	for i, n := range []*lab.Node{n1, n2} {
		s := k.waitReady(n, 2)
		if s.Store.Kind != "kubernetes" || s.Lease.Subnets[0] != netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(i + 1), 0}), 24) {
			t.Errorf("%s: %+v, %+v", n.ID, s.Store, s.Lease)
		}
		if err := flannel.AddPeer(subnet.Endpoint{
			Subnet: s.Lease.Subnets[0], Public: n.Addrs[0], VTEP: subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC(n.ID, 1, false)},
		}); err != nil {
			t.Fatal(err)
		}
		if condition := k.kubectl("get", "node", n.ID, "-o", `jsonpath={.status.conditions[?(@.type=="NetworkUnavailable")].status}`); condition != "False" {
			t.Errorf("%s: NetworkUnavailable is %q", n.ID, condition)
		}
	}
	t.Logf("from the daemons' start to ready: %v", time.Since(began).Round(time.Millisecond))
	var pods []*lab.Pod
	for _, n := range []*lab.Node{n1, n2} {
		p, err := n.AddPod(t.Context(), "p1")
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, p)
	}
	ping(t, pods[0], pods[1])
	for _, p := range pods {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		if _, err := p.Ping(ctx, p.Addrs[0], netip.MustParseAddr("10.244.3.0")); err != nil {
			t.Errorf("%s to flannel's node: %v", p.Addrs[0], err)
		}
		cancel()
	}

	for _, p := range k.Processes() {
		if p == first || strings.HasPrefix(p.Name, "n2-") {
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
			if err != nil {
				t.Fatal(err)
			}
			_, rss, _ := strings.Cut(string(text), "VmRSS:")
			rss, _, _ = strings.Cut(rss, "\n")
			t.Logf("resident memory of %s: %s", p.Name, strings.TrimSpace(rss))
		}
	}

	t.Run("from flannel to culvert", func(t *testing.T) {
		k.run(n3, "--datapath=kernel", "--take-over-flannel")
		k.waitReady(n3, 2)
		p, err := n3.AddPod(t.Context(), "p1")
		if err != nil {
			t.Fatal(err)
		}
		ping(t, pods[0], p)
		ping(t, p, pods[1])
		if mac := k.kubectl("get", "node", "n3", "-o", `jsonpath={.metadata.annotations.flannel\.alpha\.coreos\.com/backend-data}`); !strings.Contains(mac, flannel.Self.VTEP.MAC.String()) {
			t.Errorf("the annotation backend-data of n3 is %s", mac)
		}
	})

	t.Run("replaced", func(t *testing.T) {
		first = k.replaced(n1, first, pods[1], pods[0], "--datapath=userspace")
	})

	t.Run("an address from the annotation", func(t *testing.T) {
		const address = "198.18.0.77"
		if _, err := n1.Run(t.Context(), "ip", "address", "add", address+"/24", "dev", n1.Link); err != nil {
			t.Fatal(err)
		}
		k.kubectl("annotate", "node", "n1", "flannel.alpha.coreos.com/node-public-ip="+address)
		if err := first.Stop(); err != nil {
			t.Fatal(err)
		}
		first = k.run(n1, "--datapath=userspace", "--public-ip=192.0.2.9") // which the annotation overrides, as in flannel
		k.wait(n1, "uses the address", func(s api.Status) bool {
			return s.Ready && len(s.Peers) == 2 && slices.Contains(s.Underlay.Addrs, netip.MustParseAddr(address)) && slices.Contains(s.Lease.PublicIPs, netip.MustParseAddr(address))
		})
		if public := k.kubectl("get", "node", "n1", "-o", `jsonpath={.metadata.annotations.flannel\.alpha\.coreos\.com/public-ip}`); public != address {
			t.Errorf("the annotation public-ip of n1 is %s", public)
		}
		ping(t, pods[0], pods[1])
	})

	t.Run("restarted while the API server is unreachable", func(t *testing.T) {
		k.waitKept(n1, 3)
		if err := k.api.Kill(); err != nil {
			t.Fatal(err)
		}
		k.wait(n1, "reports that the API server is unreachable", func(s api.Status) bool { return s.Ready && !s.Store.Connected && s.Store.Error != "" })
		pings := startPings(t, pods[1], pods[0])
		if err := first.Stop(); err != nil {
			t.Fatal(err)
		}
		second := k.run(n1, "--datapath=userspace", "--start-jitter=1h")
		s := k.wait(n1, "is ready with the leases from disk", func(s api.Status) bool { return s.Ready && !s.Store.Snapshot.IsZero() })
		if len(s.Peers) != 2 {
			t.Errorf("peers: %v", s.Peers)
		}
		if err := cniStatus(t, n1); err != nil {
			t.Errorf("a pod could not be added: %v", err)
		}
		ping(t, pods[0], pods[1])
		sent, lost := pings.stop()
		t.Logf("of %d pings %d lost, longest gap %s", sent, lost, pings.gap())
		first = k.replaced(n1, second, pods[1], pods[0], "--datapath=userspace")
		if s, err := k.status(n1); err != nil || s.Store.Snapshot.IsZero() {
			t.Errorf("the successor does not serve from the snapshot on disk: %+v, %v", s.Store, err)
		}
		k.startAPI()
		k.wait(n1, "is connected to the API server again", func(s api.Status) bool { return s.Store.Connected && s.Store.Snapshot.IsZero() })
	})

	t.Run("a Node recreated with another podCIDR", func(t *testing.T) {
		k.kubectl("delete", "node", "n2", "--wait=false")
		k.addNode("n2", "10.244.9.0/24", nil)
		s := k.wait(n2, "is fenced", func(s api.Status) bool { return s.Fenced != nil })
		if !strings.Contains(s.Fenced.Reason, "10.244.9.0/24") {
			t.Errorf("fenced: %+v", s.Fenced)
		}
		if err := cniStatus(t, n2); err == nil {
			t.Error("a pod could be added")
		}
		k.wait(n1, "has lost the peer", func(s api.Status) bool { return len(s.Peers) == 1 })
		if err := pods[1].Delete(t.Context()); err != nil {
			t.Fatal(err)
		}
		s = k.waitReady(n2, 2)
		if s.Lease.Subnets[0].String() != "10.244.9.0/24" {
			t.Errorf("its subnet is %v", s.Lease.Subnets)
		}
		k.waitReady(n1, 2)
		// Peers' kernels have the new subnet's route and not the old one's.
		eventually(t, "n3's routes follow", func() error {
			routes, err := n3.Run(t.Context(), "ip", "route")
			if err == nil && (strings.Contains(string(routes), "10.244.2.0/24") || !strings.Contains(string(routes), "10.244.9.0/24")) {
				err = fmt.Errorf("%s", routes)
			}
			return err
		})
		p, err := n2.AddPod(t.Context(), "p2")
		if err != nil {
			t.Fatal(err)
		}
		ping(t, pods[0], p)
	})
}

// TestKubernetesMemory measures a daemon's resident memory with 100 peers in Kubernetes.
func TestKubernetesMemory(t *testing.T) {
	for _, datapath := range datapaths {
		t.Run(datapath, func(t *testing.T) {
			k := newKubernetes(t, 1)
			n := k.Nodes[0]
			k.addNode(n.ID, "10.244.0.0/24", nil)
			var nodes []any
			for i := range memoryPeers {
				cidr := fmt.Sprintf("10.244.%d.0/24", 1+i)
				nodes = append(nodes, map[string]any{
					"apiVersion": "v1", "kind": "Node", "spec": map[string]any{"podCIDR": cidr, "podCIDRs": []string{cidr}},
					"metadata": map[string]any{"name": fmt.Sprintf("peer-%d", i), "annotations": map[string]string{
						"flannel.alpha.coreos.com/kube-subnet-manager": "true", "flannel.alpha.coreos.com/backend-type": "vxlan",
						"flannel.alpha.coreos.com/public-ip":    fmt.Sprintf("192.0.2.%d", 1+i),
						"flannel.alpha.coreos.com/backend-data": fmt.Sprintf(`{"VNI":1,"VtepMAC":"%s"}`, subnet.DeriveMAC(strconv.Itoa(i), 1, false)),
					}},
				})
			}
			list, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "List", "items": nodes})
			if err != nil {
				t.Fatal(err)
			}
			k.kubectl("create", "-f", k.write("peers.json", string(list)))
			k.measureMemory(n, k.run(n, "--datapath="+datapath))
		})
	}
}
