//go:build kubernetes

package kube

import (
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"culvert/subnet"
	"culvert/subnet/contract"
	"culvert/subnet/kube/kubetest"

	"go.uber.org/goleak"
	"sigs.k8s.io/yaml"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// cluster is a real API server with the RBAC rules of our manifests.
type cluster struct {
	*kubetest.Server
	netConf string
	token   string // file name
}

// start starts an API server. Registries use the service account's token.
func start(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{Server: kubetest.Start(t, ""), netConf: filepath.Join(t.TempDir(), "net-conf.json"), token: filepath.Join(t.TempDir(), "token")}
	c.grant(t)
	c.setToken(t, kubetest.CulvertToken)
	return c
}

// manifests is the directory of the manifests for this store.
const manifests = "../../deploy/kubernetes/kubernetes/"

// paths are the API paths of the kinds that apply supports.
var paths = map[string]string{
	"ServiceAccount":                   "/api/v1/namespaces/culvert/serviceaccounts/",
	"ClusterRole":                      "/apis/rbac.authorization.k8s.io/v1/clusterroles/",
	"ClusterRoleBinding":               "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/",
	"ValidatingAdmissionPolicy":        "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies/",
	"ValidatingAdmissionPolicyBinding": "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings/",
}

// apply applies a manifest.
func (c *cluster) apply(t *testing.T, file string) {
	t.Helper()
	text, err := os.ReadFile(manifests + file)
	if err != nil {
		t.Fatal(err)
	}
	for _, document := range strings.Split(string(text), "\n---\n") {
		var o struct {
			Kind     string
			Metadata struct{ Name string }
		}
		if err := yaml.Unmarshal([]byte(document), &o); err != nil {
			t.Fatal(err)
		}
		c.Apply(paths[o.Kind]+o.Metadata.Name, "application/apply-patch+yaml", document)
	}
}

// grant grants the service account its permissions.
func (c *cluster) grant(t *testing.T) {
	t.Helper()
	if _, err := c.Try(http.MethodGet, "/api/v1/namespaces/culvert", "", nil); err != nil {
		c.Do(http.MethodPost, "/api/v1/namespaces", "application/json", `{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"culvert"}}`)
	}
	c.apply(t, "rbac.yaml")
}

func (c *cluster) setToken(t *testing.T, token string) {
	t.Helper()
	if err := os.WriteFile(c.token, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// options returns the options of the node's registry, with a kubeconfig in place of
// a pod's service account.
func (c *cluster) options(t testing.TB, node string) Options {
	t.Helper()
	config := filepath.Join(t.TempDir(), "kubeconfig")
	text := `{"current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
"clusters": [{"name": "c", "cluster": {"server": "` + c.URL() + `", "certificate-authority": "` + c.CAFile() + `"}}],
"users": [{"name": "u", "user": {"tokenFile": "` + c.token + `"}}]}`
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return Options{
		Kubeconfig: config, Node: node, NetConf: c.netConf, NetworkUnavailable: true, RequestTimeout: 5 * time.Second,
		Logger: slog.New(slog.DiscardHandler),
	}
}

// open returns a registry that is closed when the test ends.
func (c *cluster) open(t *testing.T, node string, change ...func(*Options)) *Registry {
	t.Helper()
	o := c.options(t, node)
	for _, f := range change {
		f(&o)
	}
	r, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func (c *cluster) SetConfig(t *testing.T, text string) {
	if err := os.WriteFile(c.netConf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (c *cluster) Open(t *testing.T, n int, dir string) subnet.Registry {
	name := contract.NodeName(n)
	if _, err := c.Try(http.MethodGet, "/api/v1/nodes/"+name, "", nil); err != nil && strings.Contains(err.Error(), "404") {
		c.PutNode(name, []string{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 5, byte(n), 0}), 24).String()}, nil)
	}
	return c.open(t, name, func(o *Options) { o.SnapshotFile = filepath.Join(dir, "snapshot.json") })
}

// flannel returns the annotations of a Node running flannel.
func flannel(public, mac string) map[string]any {
	return map[string]any{
		"flannel.alpha.coreos.com/kube-subnet-manager": "true", "flannel.alpha.coreos.com/backend-type": "vxlan",
		"flannel.alpha.coreos.com/backend-data": `{"VNI":1,"VtepMAC":"` + mac + `"}`, "flannel.alpha.coreos.com/public-ip": public,
	}
}

func peerName(n int) string { return "peer-" + string(rune('0'+n)) }

func (c *cluster) PutPeer(_ *testing.T, n int, public netip.Addr) {
	c.PutNode(peerName(n), []string{contract.PeerSubnet(n).String()}, flannel(public.String(), contract.PeerMAC(n).String()))
}

func (c *cluster) SpoilPeer(_ *testing.T, n int) {
	c.PutNode(peerName(n), []string{contract.PeerSubnet(n).String()}, map[string]any{"flannel.alpha.coreos.com/backend-data": "spoilt"})
}

func (c *cluster) DropPeer(_ *testing.T, n int) { c.DeleteNode(peerName(n)) }

func (c *cluster) Stop(*testing.T)  { c.Server.Stop() }
func (c *cluster) Start(*testing.T) { c.Run() }

// empty removes what earlier parts created.
func (c *cluster) empty(t *testing.T) *cluster {
	t.Helper()
	c.Do(http.MethodDelete, "/api/v1/nodes", "", nil)
	_ = os.Remove(c.netConf)
	c.setToken(t, kubetest.CulvertToken)
	return c
}

func TestContract(t *testing.T) {
	c := start(t)
	contract.RunRemote(t, func(t *testing.T) contract.Remote { return c.empty(t) })
}
