//go:build kubernetes

package test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"culvert/internal/lab"
)

// flannelConflist is the conflist of kube-flannel.yml.
const flannelConflist = `{"name": "cbr0", "cniVersion": "0.3.1", "plugins": [
{"type": "flannel", "delegate": {"hairpinMode": true, "isDefaultGateway": true}}, {"type": "portmap", "capabilities": {"portMappings": true}}]}`

// annotationPrefix is the prefix of flannel's annotations in a jsonpath.
const annotationPrefix = `.metadata.annotations.flannel\.alpha\.coreos\.com/`

// flannel sets the hosts up as flannel's DaemonSet does: the device and its entries, the
// annotations, subnet.env, and the plugin with its configuration. No flannel daemon
// follows the annotations; the test does.
func (k *kubelets) flannel() (devices []*lab.HandmadeVXLAN) {
	t := k.t
	t.Helper()
	plugin, err := os.ReadFile(filepath.Join(k.bin, "culvert-cni"))
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range k.machines {
		podCIDR := netip.MustParsePrefix(k.kubectl("get", "node", h.ID, "-o", "jsonpath={.spec.podCIDR}"))
		v, err := h.AddHandmadeVXLAN(lab.VXLANOptions{Subnet: podCIDR})
		if err != nil {
			t.Fatal(err)
		}
		for i, other := range devices {
			if err := v.AddPeer(other.Self); err != nil {
				t.Fatal(err)
			}
			if err := devices[i].AddPeer(v.Self); err != nil {
				t.Fatal(err)
			}
		}
		devices = append(devices, v)
		k.kubectl("annotate", "--overwrite", "node", h.ID, "culvert/pod-cidrs-",
			"flannel.alpha.coreos.com/kube-subnet-manager=true", "flannel.alpha.coreos.com/backend-type=vxlan", "flannel.alpha.coreos.com/public-ip="+h.Addrs[0].String(),
			fmt.Sprintf(`flannel.alpha.coreos.com/backend-data={"VNI":1,"VtepMAC":"%s"}`, v.Self.VTEP.MAC))
		for path, file := range map[string]struct {
			text string
			mode os.FileMode
		}{
			"/opt/cni/bin/flannel":               {string(plugin), 0o755},
			"/run/flannel/subnet.env":            {fmt.Sprintf("FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=%s/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n", podCIDR.Addr().Next()), 0o644},
			"/etc/cni/net.d/10-flannel.conflist": {flannelConflist, 0o644},
		} {
			if err := os.MkdirAll(filepath.Dir(h.path(path)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(h.path(path), []byte(file.text), file.mode); err != nil {
				t.Fatal(err)
			}
		}
	}
	return devices
}

// overFlannel writes the kustomization of docs/kubernetes.md for the migration from
// flannel without a drain.
func (k *kubelets) overFlannel() (dir string) {
	t := k.t
	t.Helper()
	dir = filepath.Join(k.files, "over-flannel")
	base, err := filepath.Abs("../deploy/kubernetes/kubernetes")
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err == nil {
		base, err = filepath.Rel(dir, base)
	}
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(map[string]any{
		"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": []string{base},
		"patches": []any{map[string]any{"target": map[string]any{"kind": "DaemonSet"}, "patch": `[
{"op": "add", "path": "/spec/template/spec/nodeSelector/culvert", "value": "yes"},
{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--take-over-flannel"},
{"op": "add", "path": "/spec/template/spec/initContainers/0/args/-", "value": "--network-name=cbr0"},
{"op": "add", "path": "/spec/template/spec/initContainers/0/args/-", "value": "--data-dir=/var/lib/cni/flannel"}]`}},
	})
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "kustomization.yaml"), text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// fromFlannel migrates the hosts from flannel to culvert, one after the other, while
// their pods keep running.
func (k *kubelets) fromFlannel(t *testing.T) {
	h1, h2 := k.machines[0], k.machines[1]
	devices := k.flannel()
	for _, h := range k.machines {
		k.within(time.Minute, "wait", "--for=condition=Ready", "node/"+h.ID)
	}
	k.create(webPod("a", "n1"), webPod("c", "n2"))
	a, c := k.pod("a", h1), k.pod("c", h2)
	web := func(p *lab.Pod) string { return netip.AddrPortFrom(p.Addrs[0], 8080).String() }
	k.reach("over flannel", a.Namespace, web(c), "c", a.Addrs[0])

	to, from := startPings(t, a, c), startPings(t, c, a)
	k.kubectl("apply", "-k", k.overFlannel())
	for i, h := range k.machines {
		k.kubectl("label", "node", h.ID, "culvert=yes")
		k.within(time.Minute, "-n", "culvert", "wait", "--for=create", "pod", "--field-selector=spec.nodeName="+h.ID)
		k.within(time.Minute, "-n", "culvert", "wait", "--for=condition=Ready", "pod", "--field-selector=spec.nodeName="+h.ID)
		// The address of flannel's device stays, so its peers have nothing to learn.
		if data := k.kubectl("get", "node", h.ID, "-o", "jsonpath={"+annotationPrefix+"backend-data}"); !strings.Contains(data, devices[i].Self.VTEP.MAC.String()) {
			t.Errorf("the annotation backend-data of %s is %s, and was of %s", h.ID, data, devices[i].Self.VTEP.MAC)
		}
		if err := os.Remove(h.path("/etc/cni/net.d/10-flannel.conflist")); err != nil {
			t.Fatal(err)
		}
		when := h.ID + " moved"
		k.reach(when+": there", a.Namespace, web(c), "c", a.Addrs[0])
		k.reach(when+": and back", c.Namespace, web(a), "a", c.Addrs[0])
	}
	sent, lost := 0, 0
	for _, p := range []*pings{to, from} {
		s, l := p.stop()
		sent, lost = sent+s, lost+l
	}
	k.figure("from flannel to culvert, two nodes without a drain: %d of %d pings lost, %v without an answer at the longest", lost, sent, max(to.gap(), from.gap()))

	// New pods have addresses that no pod of flannel's has.
	k.create(webPod("b", "n1"), webPod("d", "n2"))
	b, d := k.pod("b", h1), k.pod("d", h2)
	if b.Addrs[0] == a.Addrs[0] || d.Addrs[0] == c.Addrs[0] {
		t.Errorf("an address is given out twice: %v, %v, %v, %v", a.Addrs, b.Addrs, c.Addrs, d.Addrs)
	}
	k.reach("new pod to an old one", b.Namespace, web(c), "c", b.Addrs[0])
	k.reach("old pod to a new one", a.Namespace, web(d), "d", a.Addrs[0])
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for _, h := range k.machines {
		if links, err := h.Run(ctx, "ip", "-brief", "link"); err != nil || strings.Contains(string(links), "flannel") {
			t.Errorf("%s still has flannel's device (%v):\n%s", h.ID, err, links)
		}
	}
	k.within(time.Minute, "delete", "pod", "--all")
	for _, h := range k.machines {
		eventually(t, h.ID+": addresses at the end", func() error {
			if left := h.reserved("cbr0"); len(left) > 0 {
				return fmt.Errorf("host-local still has %v", left)
			}
			return nil
		})
	}
}
