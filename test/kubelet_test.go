//go:build kubernetes

package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/internal/testca"
)

// webPod is a pod of the test's image on a node, found by the label name too.
func webPod(name, node string) map[string]any {
	return map[string]any{
		"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": name, "labels": map[string]any{"name": name}},
		"spec": map[string]any{
			"nodeSelector": map[string]any{"kubernetes.io/hostname": node}, "terminationGracePeriodSeconds": 1, "dnsPolicy": "Default",
			"containers": []any{map[string]any{"name": "web", "image": webImage, "ports": []any{map[string]any{"containerPort": 8080}}}},
		},
	}
}

// service is a Service on port 80 for the pods with a label name.
func service(name, pods string, more map[string]any) map[string]any {
	spec := map[string]any{"selector": map[string]any{"name": pods}, "ports": []any{map[string]any{"port": 80, "targetPort": 8080}}}
	for key, v := range more {
		spec[key] = v
	}
	return map[string]any{"apiVersion": "v1", "kind": "Service", "metadata": map[string]any{"name": name}, "spec": spec}
}

// create creates objects.
func (k *kubelets) create(objects ...map[string]any) {
	k.t.Helper()
	text, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "List", "items": objects})
	if err != nil {
		k.t.Fatal(err)
	}
	k.kubectl("create", "-f", k.write("objects.json", string(text)))
}

// pod returns a running pod and its network namespace.
func (k *kubelets) pod(name string, h *machine) *lab.Pod {
	k.t.Helper()
	k.within(time.Minute, "wait", "--for=condition=Ready", "pod/"+name)
	a, err := netip.ParseAddr(k.kubectl("get", "pod", name, "-o", "jsonpath={.status.podIP}"))
	if err != nil {
		k.t.Fatal(err)
	}
	return &lab.Pod{Namespace: h.namespace(name), ID: name, Node: h.Node, IfName: "eth0", Addrs: []netip.Addr{a}}
}

// fetch requests a server from inside a namespace until it answers, and returns the name
// of the pod that answered, and the client address that it saw.
func (k *kubelets) fetch(what string, from *lab.Namespace, to string) (name string, seen netip.Addr) {
	k.t.Helper()
	client := &http.Client{Transport: &http.Transport{DialContext: from.Dial, DisableKeepAlives: true}, Timeout: 3 * time.Second}
	eventually(k.t, what, func() error {
		r, err := http.NewRequestWithContext(k.t.Context(), http.MethodGet, "http://"+to, http.NoBody)
		if err != nil {
			return err
		}
		answer, err := client.Do(r)
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		text, err := io.ReadAll(answer.Body)
		if err != nil {
			return err
		}
		var at string
		if _, err := fmt.Sscan(string(text), &name, &at); err != nil {
			return fmt.Errorf("it answers %q: %w", text, err)
		}
		addr, err := netip.ParseAddrPort(at)
		seen = addr.Addr().Unmap()
		return err
	})
	return name, seen
}

// reach expects an answer from a pod, and, if source is valid, that the pod saw it as the
// client's address.
func (k *kubelets) reach(what string, from *lab.Namespace, to, pod string, source netip.Addr) {
	k.t.Helper()
	name, seen := k.fetch(what, from, to)
	if name != pod {
		k.t.Errorf("%s: %s answered, not %s", what, name, pod)
	}
	if source.IsValid() && seen != source {
		k.t.Errorf("%s: the pod saw %s, not %s", what, seen, source)
	}
}

// daemonStatus returns the status of the daemon in the host's culvert pod.
func (h *machine) daemonStatus() (api.Status, error) {
	ctx, cancel := context.WithTimeout(h.k.t.Context(), 2*time.Second)
	defer cancel()
	return api.GetStatus(ctx, h.RunDir)
}

// rollout waits until all pods of the DaemonSet have its newest template and are Ready.
func (k *kubelets) rollout() {
	k.t.Helper()
	k.within(2*time.Minute, "-n", "culvert", "rollout", "status", "daemonset/culvert")
}

// update rolls out a change of the DaemonSet by kubectl, under pings in both directions
// that continue until the old pods have ended and at least atLeast pings were sent. It
// returns how many were lost.
func (k *kubelets) update(what string, atLeast int, a, b *lab.Pod, args ...string) (lost int) {
	k.t.Helper()
	old := k.kubectl("-n", "culvert", "get", "daemonset/culvert", "-o", `jsonpath={.metadata.annotations.deprecated\.daemonset\.template\.generation}`)
	to, from := startPings(k.t, a, b), startPings(k.t, b, a)
	began := time.Now()
	k.kubectl(append([]string{"-n", "culvert"}, args...)...)
	k.rollout()
	took := time.Since(began)
	k.within(time.Minute, "-n", "culvert", "wait", "--for=delete", "pod", "-l", "pod-template-generation="+old)
	for to.sentSoFar()+from.sentSoFar() < atLeast {
		time.Sleep(pingEvery)
	}
	sent := 0
	for _, p := range []*pings{to, from} {
		s, l := p.stop()
		sent, lost = sent+s, lost+l
	}
	k.figure("%s: %.1f s for %d nodes, %d of %d pings lost, %v without an answer at the longest",
		what, took.Seconds(), len(k.machines), lost, sent, max(to.gap(), from.gap()))
	return lost
}

// readyTogether waits until all Nodes are Ready, and expects their daemons to be ready by
// then: the runtime must see the network only when pods can be added.
func (k *kubelets) readyTogether() {
	k.t.Helper()
	for _, h := range k.machines {
		k.within(90*time.Second, "wait", "--for=condition=Ready", "node/"+h.ID)
		if s, err := h.daemonStatus(); err != nil || !s.Ready {
			k.t.Errorf("the Node %s is Ready, its daemon is not: %v, %s", h.ID, err, s.NotReady)
		}
	}
}

// step runs a subtest. A failure in the cluster's methods fails this subtest.
func (k *kubelets) step(name string, f func(*testing.T)) {
	t := k.t.(*testing.T)
	defer func() { k.t = t }()
	t.Run(name, func(t *testing.T) {
		k.t = t
		f(t)
	})
}

// TestKubernetesNodes applies the shipped manifests, unchanged, to a complete cluster of
// two nodes:
//
//	kubelet, kube-proxy, containerd          kubelet, kube-proxy, containerd
//	pods ── n1 (culvert's pod) ── underlay ── n2 (culvert's pod) ── pods
//	                                │
//	     kube-apiserver, kube-controller-manager, kube-scheduler, etcd
func TestKubernetesNodes(t *testing.T) {
	k := newKubelets(t, 2)
	h1, h2 := k.machines[0], k.machines[1]

	// A node without a network is not Ready.
	for _, h := range k.machines {
		eventually(t, h.ID+" lacks a network", func() error {
			reason, err := k.tryKubectl("get", "node", h.ID, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].message}`)
			if err == nil && !strings.Contains(reason, "cni plugin not initialized") {
				err = errors.New(reason)
			}
			return err
		})
	}
	began := time.Now()
	k.kubectl("apply", "-f", "../deploy/kubernetes/culvert.yaml")
	k.readyTogether()
	ready := time.Since(began)
	k.rollout()
	k.figure("from apply to all Nodes Ready: %.1f s, to all daemons Ready: %.1f s", ready.Seconds(), time.Since(began).Seconds())

	withHostPort := webPod("c", "n2")
	containers := withHostPort["spec"].(map[string]any)["containers"].([]any)
	containers[0].(map[string]any)["ports"] = []any{map[string]any{"containerPort": 8080, "hostPort": 8081}}
	k.create(webPod("a", "n1"), webPod("b", "n1"), withHostPort,
		service("a", "a", map[string]any{"clusterIP": "10.96.0.11"}),
		service("b", "b", map[string]any{"clusterIP": "10.96.0.12"}),
		service("c", "c", map[string]any{"clusterIP": "10.96.0.13", "type": "NodePort", "ports": []any{map[string]any{"port": 80, "targetPort": 8080, "nodePort": 30080}}}))
	a, b, c := k.pod("a", h1), k.pod("b", h1), k.pod("c", h2)
	talk := func(when string) {
		t.Helper()
		at := func(what string) string { return when + ": " + what }
		web := func(p *lab.Pod) string { return netip.AddrPortFrom(p.Addrs[0], 8080).String() }
		none := netip.Addr{}
		k.reach(at("pod to pod across nodes"), a.Namespace, web(c), "c", a.Addrs[0])
		k.reach(at("pod to pod back"), c.Namespace, web(a), "a", c.Addrs[0])
		k.reach(at("pod to pod on one node"), a.Namespace, web(b), "b", a.Addrs[0])
		k.reach(at("node to its own pod"), h1.Namespace, web(a), "a", none)
		k.reach(at("node to another's pod"), h1.Namespace, web(c), "c", none)
		k.reach(at("ClusterIP across nodes"), a.Namespace, "10.96.0.13", "c", a.Addrs[0])
		k.reach(at("ClusterIP on one node"), a.Namespace, "10.96.0.12", "b", a.Addrs[0])
		k.reach(at("ClusterIP from a node"), h1.Namespace, "10.96.0.13", "c", none)
		k.reach(at("hairpin by its own ClusterIP"), a.Namespace, "10.96.0.11", "a", none)
		for _, h := range k.machines {
			k.reach(at("NodePort of "+h.ID), k.Fabric, netip.AddrPortFrom(h.Addrs[0], 30080).String(), "c", none)
		}
		k.reach(at("hostPort"), k.Fabric, netip.AddrPortFrom(h2.Addrs[0], 8081).String(), "c", none)
		k.reach(at("hostPort from a pod of the other node"), a.Namespace, netip.AddrPortFrom(h2.Addrs[0], 8081).String(), "c", none)
		k.reach(at("hairpin by its hostPort"), c.Namespace, netip.AddrPortFrom(h2.Addrs[0], 8081).String(), "c", none)
	}
	talk("at first")

	k.step("update of the kernel datapath", func(t *testing.T) {
		if lost := k.update("update, kernel datapath", 3000, a, c, "rollout", "restart", "daemonset/culvert"); lost > 0 {
			t.Errorf("%d pings lost", lost)
		}
	})
	k.step("update of the userspace datapath", func(t *testing.T) {
		k.update("change from the kernel to the userspace datapath", 0, a, c, "set", "env", "daemonset/culvert", "--containers=culvert", "CULVERT_DATAPATH=userspace")
		for _, h := range k.machines {
			if s, err := h.daemonStatus(); err != nil || s.Datapath.Kind != "userspace" {
				t.Fatalf("%s: %v, datapath %+v", h.ID, err, s.Datapath)
			}
		}
		// The new pod takes over from the old one beside it.
		if lost := k.update("update, userspace datapath", 3000, a, c, "rollout", "restart", "daemonset/culvert"); lost > 0 {
			t.Errorf("%d pings lost", lost)
		}
		k.update("change back to the kernel datapath", 0, a, c, "set", "env", "daemonset/culvert", "--containers=culvert", "CULVERT_DATAPATH-")
	})

	k.step("many pods at once", func(t *testing.T) {
		many := 20
		long := os.Getenv("CULVERT_PODS")
		if long != "" {
			var err error
			if many, err = strconv.Atoi(long); err != nil {
				t.Fatal(err)
			}
		}
		k.many("culvert", many, h1)
		if long == "" {
			return
		}
		// For comparison: the bridge plugin alone, which culvert's plugin calls.
		conf := h1.path("/etc/cni/net.d/00-bridge.conflist")
		if err := os.WriteFile(conf, []byte(`{"name": "plain", "cniVersion": "1.0.0", "plugins": [{"type": "bridge", "bridge": "plain0", "isGateway": true,
"ipam": {"type": "host-local", "ranges": [[{"subnet": "10.99.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}, {"type": "portmap", "capabilities": {"portMappings": true}}]}`), 0o600); err != nil {
			t.Fatal(err)
		}
		k.many("plain", many, h1)
		if err := os.Remove(conf); err != nil {
			t.Fatal(err)
		}
	})

	k.step("reboot", func(t *testing.T) {
		began := time.Now()
		h1.reboot()
		for _, name := range []string{"a", "b"} {
			restarted := func() error {
				// The kubelet updates the status with a delay.
				text, err := k.tryKubectl("get", "pod", name, "-o", "jsonpath={.status.containerStatuses[0].restartCount} {.status.containerStatuses[0].ready}")
				if err == nil && text != "1 true" {
					err = fmt.Errorf("restarts and readiness: %s", text)
				}
				return err
			}
			for end := time.Now().Add(time.Minute); restarted() != nil && time.Now().Before(end); {
				time.Sleep(200 * time.Millisecond)
			}
			if err := restarted(); err != nil {
				t.Fatalf("pod %s after the reboot: %v", name, err)
			}
		}
		k.figure("from power on to all pods Ready: %.1f s", time.Since(began).Seconds())
		k.rollout()
		a, b = k.pod("a", h1), k.pod("b", h1)
		k.addresses("after the reboot", h1)
		talk("after the reboot")
	})

	k.step("a Node deleted and made anew", func(t *testing.T) {
		var node map[string]any
		if err := json.Unmarshal([]byte(k.kubectl("get", "node", "n2", "-o", "json")), &node); err != nil {
			t.Fatal(err)
		}
		delete(node, "status")
		meta := node["metadata"].(map[string]any)
		node["metadata"] = map[string]any{"name": "n2", "labels": meta["labels"]} // without annotations
		delete(node["spec"].(map[string]any), "taints")
		k.kubectl("delete", "node", "n2")
		k.create(node)
		k.within(time.Minute, "wait", "--for=condition=Ready", "node/n2")
		k.within(time.Minute, "wait", `--for=jsonpath={.metadata.annotations.flannel\.alpha\.coreos\.com/kube-subnet-manager}=true`, "node/n2")
		talk("after it")
		k.create(webPod("d", "n2"))
		d := k.pod("d", h2)
		k.reach("to a pod of after it", a.Namespace, netip.AddrPortFrom(d.Addrs[0], 8080).String(), "d", a.Addrs[0])
		k.addresses("after it", h2)
	})

	k.step("a Node registered anew, with another podCIDR", func(t *testing.T) {
		k.kubectl("delete", "node", "n2")
		h2.restartKubelet()
		k.within(time.Minute, "wait", "--for=create", "node/n2")
		k.within(time.Minute, "wait", "--for=jsonpath={.spec.podCIDR}", "node/n2")
		podCIDR := k.kubectl("get", "node", "n2", "-o", "jsonpath={.spec.podCIDR}")
		if netip.MustParsePrefix(podCIDR).Contains(c.Addrs[0]) {
			t.Fatalf("it is given %s again", podCIDR)
		}
		// Its pods have addresses of a podCIDR that may belong to another node by now.
		eventually(t, "n2 is fenced", func() error {
			s, err := h2.daemonStatus()
			if err == nil && s.Fenced == nil {
				err = fmt.Errorf("ready %t: %s", s.Ready, s.NotReady)
			}
			return err
		})
		k.within(time.Minute, "delete", "pod", "c", "d")
		eventually(t, "n2 has its new subnet", func() error {
			s, err := h2.daemonStatus()
			if err == nil && (!s.Ready || s.Lease.Subnets[0].String() != podCIDR) {
				err = fmt.Errorf("ready %t: %s", s.Ready, s.NotReady)
			}
			return err
		})
		k.create(withHostPort)
		c = k.pod("c", h2)
		if !netip.MustParsePrefix(podCIDR).Contains(c.Addrs[0]) {
			t.Errorf("a new pod has %s, not one of %s", c.Addrs[0], podCIDR)
		}
		talk("with another podCIDR")
		k.addresses("with another podCIDR", h2)
	})

	k.step("etcd as the store", func(t *testing.T) {
		k.uninstall("../deploy/kubernetes/culvert.yaml")
		endpoint, files := k.startEtcd()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if _, err := k.Fabric.Run(ctx, filepath.Join(k.bin, "culvert"), "config", "set", `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}`, "--etcd-endpoints", endpoint,
			"--etcd-cafile", filepath.Join(files, "ca.pem"), "--etcd-certfile", filepath.Join(files, "client.pem"), "--etcd-keyfile", filepath.Join(files, "client-key.pem")); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		manifest := k.etcdManifest(endpoint, files)
		k.kubectl("apply", "-f", manifest)
		k.readyTogether()
		k.rollout()
		k.figure("from apply to all daemons Ready, with etcd: %.1f s", time.Since(began).Seconds())
		k.create(webPod("a", "n1"), webPod("b", "n1"), withHostPort)
		a, b, c = k.pod("a", h1), k.pod("b", h1), k.pod("c", h2)
		talk("with etcd")
		if lost := k.update("update, kernel datapath, etcd", 0, a, c, "rollout", "restart", "daemonset/culvert"); lost > 0 {
			t.Errorf("%d pings lost", lost)
		}
		k.uninstall(manifest)
	})

	k.step("from flannel", k.fromFlannel)
	t.Logf("figures:\n  %s", strings.Join(k.figures, "\n  "))
}

// figure records a measurement. All are logged at the end.
func (k *kubelets) figure(format string, args ...any) {
	k.t.Helper()
	k.figures = append(k.figures, fmt.Sprintf(format, args...))
	k.t.Log(k.figures[len(k.figures)-1])
}

// many runs n pods of a network on a host at once, and expects that no address stays
// reserved after they are deleted.
func (k *kubelets) many(network string, n int, h *machine) {
	k.t.Helper()
	before := len(h.reserved(network))
	var pods []map[string]any
	for i := range n {
		p := webPod(fmt.Sprintf("many-%d", i), h.ID)
		p["metadata"].(map[string]any)["labels"] = map[string]any{"name": "many"}
		pods = append(pods, p)
	}
	began := time.Now()
	k.create(pods...)
	k.within(3*time.Minute, "wait", "--for=condition=Ready", "pod", "-l", "name=many")
	took := time.Since(began)
	k.figure("%d pods at once on a node (network %s), all Ready after %.1f s: %.2f s per pod, %.0f pods per minute",
		n, network, took.Seconds(), took.Seconds()/float64(n), float64(n)/took.Minutes())
	if has := len(h.reserved(network)); has != before+n {
		k.t.Errorf("%s: %d addresses are reserved in the network %s, and %d pods are new", h.ID, has-before, network, n)
	}
	k.within(2*time.Minute, "delete", "pod", "-l", "name=many")
	if has := len(h.reserved(network)); has != before {
		k.t.Errorf("%s: with the pods gone %d addresses of the network %s stay", h.ID, has-before, network)
	}
}

// uninstall follows docs/kubernetes.md, and expects nothing to be left.
func (k *kubelets) uninstall(manifest string) {
	k.t.Helper()
	k.within(time.Minute, "delete", "pod", "--all")
	k.within(time.Minute, "delete", "-f", manifest)
	ctx, cancel := context.WithTimeout(k.t.Context(), time.Minute)
	defer cancel()
	for _, h := range k.machines {
		culvert := filepath.Join(k.bin, "culvert")
		for _, command := range [][]string{
			{culvert, "cleanup"},
			{culvert, "cni", "uninstall"},
			{"ip", "link", "delete", "cni0"},
			{"sh", "-c", "rm -rf /run/culvert/* /var/lib/cni/culvert /var/lib/cni/networks/culvert"},
		} {
			if _, err := h.Run(ctx, "nsenter", h.inside(command...)...); err != nil {
				k.t.Fatal(err)
			}
		}
		k.within(time.Minute, "wait", "--for=condition=Ready=false", "node/"+h.ID)
		if left := h.links(); len(left) > 0 {
			k.t.Errorf("%s: the uninstallation leaves %v", h.ID, left)
		}
	}
}

// startEtcd starts another etcd, which requires client certificates, and returns its URL
// and the directory of the files for the Secret.
func (k *kubelets) startEtcd() (endpoint, files string) {
	k.t.Helper()
	ca := testca.New(k.t)
	ca.IssueFor(k.t, "client", ca, k.FabricAddrs[0])
	files = ca.Dir()
	listen := netip.AddrPortFrom(k.FabricAddrs[0], 2479).String()
	p, err := k.Fabric.Start(lab.Command{Name: "etcd-tls", Path: filepath.Join(k.bin, "culvert-etcd"), Args: []string{
		"--data-dir", filepath.Join(files, "etcd"), "--listen-client", listen, "--unsafe-no-fsync",
		"--cert-file", filepath.Join(files, "client.pem"), "--key-file", filepath.Join(files, "client-key.pem"), "--client-ca-file", filepath.Join(files, "ca.pem"),
	}})
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { _ = p.Stop() })
	ctx, cancel := context.WithTimeout(k.t.Context(), 30*time.Second)
	defer cancel()
	if _, err := p.WaitLine(ctx, "ready "); err != nil {
		k.t.Fatal(err)
	}
	return "https://" + listen, files
}

// etcdManifest returns culvert-etcd.yaml with the values that a user must fill in.
func (k *kubelets) etcdManifest(endpoint, files string) string {
	k.t.Helper()
	text, err := os.ReadFile("../deploy/kubernetes/culvert-etcd.yaml")
	if err != nil {
		k.t.Fatal(err)
	}
	manifest := regexp.MustCompile(`etcd-endpoints: .*`).ReplaceAllString(string(text), "etcd-endpoints: "+endpoint)
	for _, name := range []string{"ca.pem", "client.pem", "client-key.pem"} {
		text, err := os.ReadFile(filepath.Join(files, name))
		if err != nil {
			k.t.Fatal(err)
		}
		quoted, err := json.Marshal(string(text))
		if err != nil {
			k.t.Fatal(err)
		}
		manifest = strings.Replace(manifest, "  "+name+`: ""`, "  "+name+": "+string(quoted), 1)
	}
	return k.write("culvert-etcd.yaml", manifest)
}

// addresses expects that host-local has assigned exactly the addresses that the host's
// pods have.
func (k *kubelets) addresses(when string, h *machine) {
	k.t.Helper()
	eventually(k.t, fmt.Sprintf("%s, %s: addresses", h.ID, when), func() error {
		text, err := k.tryKubectl("get", "pods", "-A", "--field-selector=spec.nodeName="+h.ID, "-o", `jsonpath={range .items[*]}{.spec.hostNetwork}={.status.podIP} {end}`)
		if err != nil {
			return err
		}
		var pods []string
		for _, word := range strings.Fields(text) {
			if hostNetwork, ip, _ := strings.Cut(word, "="); hostNetwork != "true" {
				pods = append(pods, ip)
			}
		}
		slices.Sort(pods)
		if reserved := h.reserved("culvert"); !slices.Equal(pods, reserved) {
			return fmt.Errorf("pods have %v, host-local has given out %v", pods, reserved)
		}
		return nil
	})
}
