package kube

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"culvert/internal/fuzzloop"
	"culvert/subnet"
)

func config(t testing.TB, text string) subnet.Config {
	t.Helper()
	cfg, _, err := subnet.ParseConfig([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

const (
	vxlan4  = `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}`
	vxlan46 = `{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/56","Backend":{"Type":"vxlan"}}`
	hostgw4 = `{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}`
)

func nodeOf(t testing.TB, text string) *object {
	t.Helper()
	var o object
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		t.Fatal(err)
	}
	return &o
}

// newNames follows flannel's rule for a prefix.
func TestNames(t *testing.T) {
	for prefix, want := range map[string]string{
		"flannel.alpha.coreos.com": "flannel.alpha.coreos.com/backend-type",
		"example.com/":             "example.com/backend-type",
		"example.com/blue":         "example.com/blue-backend-type",
		"example.com/blue-":        "example.com/blue-backend-type",
	} {
		if got := newNames(prefix).backend; got != want {
			t.Errorf("%s: %s, not %s", prefix, got, want)
		}
	}
}

// TestEntry converts Nodes to leases.
func TestEntry(t *testing.T) {
	keys := newNames(DefaultPrefix)
	const f = `"flannel.alpha.coreos.com/`
	for _, c := range []struct {
		name, node, config string
		want               string // the lease, or part of the reason
	}{
		{
			"flannel's vxlan",
			`{"metadata":{"name":"n","uid":"u","annotations":{` + f + `kube-subnet-manager":"true",` + f + `backend-type":"vxlan",` + f + `backend-data":"{\"VNI\":1,\"VtepMAC\":\"c6:d2:32:6f:8f:44\"}",` + f + `public-ip":"192.0.2.1"}},
			"spec":{"podCIDR":"10.244.1.0/24","podCIDRs":["10.244.1.0/24"]}}`, vxlan4, `10.244.1.0/24 (node "n", 192.0.2.1)`,
		},
		{
			"only podCIDR, from an old API server",
			`{"metadata":{"name":"n","annotations":{` + f + `kube-subnet-manager":"true",` + f + `backend-type":"host-gw",` + f + `backend-data":"null",` + f + `public-ip":"192.0.2.1"}},
			"spec":{"podCIDR":"10.244.1.0/24"}}`, hostgw4, `10.244.1.0/24 (node "n", 192.0.2.1)`,
		},
		{
			"metadata with our annotation",
			`{"metadata":{"name":"n","uid":"u","annotations":{"culvert/pod-cidrs":"u 10.244.1.0/24,fd00:244:0:1::/64",` + f + `kube-subnet-manager":"true",` + f + `backend-type":"vxlan",` + f + `backend-data":"{\"VNI\":1,\"VtepMAC\":\"c6:d2:32:6f:8f:44\"}",` + f + `public-ip":"192.0.2.1",` + f + `backend-v6-data":"{\"VNI\":1,\"VtepMAC\":\"c6:d2:32:6f:8f:45\"}",` + f + `public-ipv6":"2001:db8::1"}}}`,
			vxlan46, `10.244.1.0/24 and fd00:244:0:1::/64 (node "n", 192.0.2.1, 2001:db8::1)`,
		},
		{
			"IPv6 first, in a network with only IPv4",
			`{"metadata":{"name":"n","uid":"u","annotations":{` + f + `kube-subnet-manager":"true",` + f + `backend-type":"vxlan",` + f + `backend-data":"{\"VNI\":1,\"VtepMAC\":\"c6:d2:32:6f:8f:44\"}",` + f + `public-ip":"192.0.2.1",` + f + `public-ipv6":"2001:db8::1"}},
			"spec":{"podCIDRs":["fd00:244:0:1::/64","10.244.1.0/24"]}}`, vxlan4, `10.244.1.0/24 (node "n", 192.0.2.1)`,
		},
		{
			"a family without an address is left out",
			`{"metadata":{"name":"n","uid":"u","annotations":{` + f + `kube-subnet-manager":"true",` + f + `backend-type":"vxlan",` + f + `backend-data":"{\"VNI\":1,\"VtepMAC\":\"c6:d2:32:6f:8f:44\"}",` + f + `public-ip":"192.0.2.1"}},
			"spec":{"podCIDRs":["10.244.1.0/24","fd00:244:0:1::/64"]}}`, vxlan46, `10.244.1.0/24 (node "n", 192.0.2.1)`,
		},
		{
			"our annotation was copied from another Node",
			`{"metadata":{"name":"n","uid":"u2","annotations":{"culvert/pod-cidrs":"u 10.244.1.0/24",` + f + `kube-subnet-manager":"true"}}}`, vxlan4, "no podCIDR",
		},
		{
			"three podCIDRs",
			`{"metadata":{"name":"n"},"spec":{"podCIDRs":["10.244.1.0/24","10.244.2.0/24","10.244.3.0/24"]}}`, vxlan4, "no podCIDR",
		},
		{
			"malformed data",
			`{"metadata":{"name":"n","annotations":{` + f + `kube-subnet-manager":"true",` + f + `backend-type":"vxlan",` + f + `backend-data":"{",` + f + `public-ip":"192.0.2.1"}},"spec":{"podCIDR":"10.244.1.0/24"}}`, vxlan4, "not JSON",
		},
		{
			"vxlan without data",
			`{"metadata":{"name":"n","annotations":{` + f + `kube-subnet-manager":"true",` + f + `backend-type":"vxlan",` + f + `backend-data":"null",` + f + `public-ip":"192.0.2.1"}},"spec":{"podCIDR":"10.244.1.0/24"}}`, vxlan4, "VtepMAC",
		},
		{
			"an address of the wrong family",
			`{"metadata":{"name":"n","annotations":{` + f + `kube-subnet-manager":"true",` + f + `backend-type":"host-gw",` + f + `public-ip":"2001:db8::1"}},"spec":{"podCIDR":"10.244.1.0/24"}}`, hostgw4, "of the subnet's family",
		},
		{
			"no backend type",
			`{"metadata":{"name":"n","annotations":{` + f + `kube-subnet-manager":"true",` + f + `public-ip":"192.0.2.1"}},"spec":{"podCIDR":"10.244.1.0/24"}}`, hostgw4, "no backend type",
		},
	} {
		o := nodeOf(t, c.node)
		facts, _ := keys.facts(o)
		l, err := facts.entry(o.Metadata.Name, config(t, c.config)).Lease()
		if err == nil && l.String() != c.want || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %s, %v", c.name, l, err)
		}
	}
}

// The annotations are byte for byte those that flannel writes.
func TestAnnotations(t *testing.T) {
	keys := newNames(DefaultPrefix)
	node := nodeOf(t, `{"metadata":{"name":"n","uid":"u-1"},"spec":{"podCIDRs":["10.244.1.0/24","fd00:244:0:1::/64"]}}`)
	for _, c := range []struct {
		name, config string
		more         map[string]string // existing annotations
		want         string            // lines
		fault        string
	}{
		{
			name: "vxlan of both families", config: vxlan46,
			want: `backend-data={"VNI":1,"VtepMAC":"02:00:00:00:00:04"}
backend-type=vxlan
backend-v6-data={"VNI":1,"VtepMAC":"02:00:00:00:00:06"}
kube-subnet-manager=true
public-ip=192.0.2.1
public-ipv6=2001:db8::1
pod-cidrs=u-1 10.244.1.0/24,fd00:244:0:1::/64`,
		},
		{
			name: "host-gw", config: hostgw4,
			want: `backend-data=null
backend-type=host-gw
kube-subnet-manager=true
public-ip=192.0.2.1
pod-cidrs=u-1 10.244.1.0/24,fd00:244:0:1::/64`,
		},
		{
			name: "overwritten", config: hostgw4, more: map[string]string{keys.overwrite: "203.0.113.9"},
			want: `backend-data=null
backend-type=host-gw
kube-subnet-manager=true
public-ip=203.0.113.9
pod-cidrs=u-1 10.244.1.0/24,fd00:244:0:1::/64`,
		},
		{name: "overwritten with an invalid address", config: hostgw4, more: map[string]string{keys.overwrite: "nonsense"}, fault: "public-ip-overwrite"},
		{name: "overwritten with the other family", config: hostgw4, more: map[string]string{keys.overwrite: "2001:db8::9"}, fault: "public-ip-overwrite"},
	} {
		o := *node
		o.Metadata.Annotations = c.more
		cfg := config(t, c.config)
		claim := subnet.Claim{Node: "n", Config: cfg, Ends: []subnet.Endpoint{
			{Public: netip.MustParseAddr("192.0.2.1"), VTEP: subnet.VTEP{VNI: 1, MAC: subnet.MAC{2, 0, 0, 0, 0, 4}}},
			{Public: netip.MustParseAddr("2001:db8::1"), VTEP: subnet.VTEP{VNI: 1, MAC: subnet.MAC{2, 0, 0, 0, 0, 6}}},
		}[:len(cfg.Networks)]}
		l, err := leaseFor(&o, claim)
		if err != nil {
			t.Fatal(err)
		}
		f, err := keys.facts(&o)
		if err != nil {
			t.Fatal(err)
		}
		got, err := keys.annotations(l, f)
		if c.fault != "" {
			if err == nil || !strings.Contains(err.Error(), c.fault) {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		want := map[string]string{}
		for line := range strings.Lines(c.want) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			prefix := "flannel.alpha.coreos.com/"
			if key == "pod-cidrs" {
				prefix = "culvert/"
			}
			want[prefix+key] = value
		}
		for key, value := range want {
			if got[key] != value {
				t.Errorf("%s: %s is %q, not %q", c.name, key, got[key], value)
			}
		}
		if err != nil || len(got) != len(want) {
			t.Errorf("%s: %v, %v", c.name, got, err)
		}
	}
}

// TestLeaseFor checks what the error says if a Node has no usable podCIDRs.
func TestLeaseFor(t *testing.T) {
	for _, c := range []struct{ name, spec, config, fault string }{
		{"ours", `{"podCIDRs":["10.244.1.0/24"]}`, vxlan4, ""},
		{"dual-stack cluster, network with only IPv4", `{"podCIDRs":["10.244.1.0/24","fd00:244:0:1::/64"]}`, vxlan4, ""},
		{"none yet", `{}`, vxlan4, "--allocate-node-cidrs"},
		{"outside of the network", `{"podCIDRs":["10.99.1.0/24"]}`, vxlan4, "--cluster-cidr must be the same"},
		{"no IPv6", `{"podCIDRs":["10.244.1.0/24"]}`, vxlan46, "is of the family of the network fd00:244::/56"},
		{"three", `{"podCIDRs":["10.244.1.0/24","10.244.2.0/24","10.244.3.0/24"]}`, vxlan4, "3 podCIDRs"},
		{"two of one family", `{"podCIDRs":["10.244.1.0/24","10.244.2.0/24"]}`, vxlan4, "of the same address family"},
		{"nonsense", `{"podCIDRs":["nonsense"]}`, vxlan4, "is not a subnet"},
	} {
		o := nodeOf(t, `{"metadata":{"name":"n"},"spec":`+c.spec+`}`)
		cfg := config(t, c.config)
		_, err := leaseFor(o, subnet.Claim{Node: "n", Config: cfg, Ends: make([]subnet.Endpoint, len(cfg.Networks))})
		if c.config != vxlan4 || c.fault != "" {
			if err == nil || !strings.Contains(err.Error(), c.fault) {
				t.Errorf("%s: %v", c.name, err)
			}
		} else if err != nil && !strings.Contains(err.Error(), "VNI") { // the claim has no VTEP
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// TestPatch checks the bytes of patches.
func TestPatch(t *testing.T) {
	o := nodeOf(t, `{"metadata":{"name":"n","uid":"u-1","annotations":{"a":"1","b":"2"}}}`)
	p, changed := newPatch(o, map[string]string{"a": "1", "b": "3"})
	up := p.networkUp(o, time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC))
	text, err := json.Marshal(p)
	const want = `{"metadata":{"uid":"u-1","annotations":{"b":"3"}},"status":{"conditions":[{"type":"NetworkUnavailable","status":"False","reason":"CulvertIsUp","message":"culvert is running on this node","lastTransitionTime":"2026-01-02T03:04:05Z","lastHeartbeatTime":"2026-01-02T03:04:05Z"}]}}`
	if err != nil || !changed || !up || string(text) != want {
		t.Errorf("%s, %v", text, err)
	}
	if p, changed := newPatch(o, map[string]string{"a": "1"}); changed || p.Status != nil {
		t.Errorf("patch without a change: %+v", p)
	}
	o = nodeOf(t, `{"metadata":{"uid":"u-1","annotations":{"flannel.alpha.coreos.com/public-ip":"192.0.2.1","flannel.alpha.coreos.com/public-ip-overwrite":"192.0.2.9","other":"x"}},
		"status":{"conditions":[{"type":"NetworkUnavailable","status":"False"}]}}`)
	p, changed = newNames(DefaultPrefix).removeAnnotations(o)
	text, err = json.Marshal(p)
	if err != nil || !changed || string(text) != `{"metadata":{"uid":"u-1","annotations":{"flannel.alpha.coreos.com/public-ip":null}}}` {
		t.Errorf("withdraw: %s, %v", text, err)
	}
	if p.networkUp(o, time.Now()) {
		t.Error("the patch sets a condition that the Node already has")
	}
}

// TestDecodeList decodes valid lists and rejects malformed ones.
func TestDecodeList(t *testing.T) {
	for text, want := range map[string]string{
		`{"kind":"NodeList","apiVersion":"v1","metadata":{"resourceVersion":"7"},"items":[{"metadata":{"name":"a"}},{"metadata":{"name":"b"}}]}`: "7 a b",
		`{"items":[],"metadata":{"resourceVersion":"8"}}`:                        "8",
		`{"metadata":{"resourceVersion":"9"},"items":null}`:                      "9",
		`{"metadata":{},"items":[]}`:                                             "!",
		`{"metadata":{"resourceVersion":"9"},"items":[{"metadata":{"name":"a"}}`: "!",
		`{"metadata":{"resourceVersion":"9"},"items":{}}`:                        "!",
		`[]`: "!",
		``:   "!",
		`{"metadata":{"resourceVersion":"9"},"items":[{"spec":{"podCIDRs":"nonsense"}}`: "!",
	} {
		got := ""
		at, err := decodeList(strings.NewReader(text), func(o *object) { got += " " + o.Metadata.Name })
		if (err != nil) != (want == "!") || err == nil && at+got != want {
			t.Errorf("%s: %q, %v", text, at+got, err)
		}
	}
}

// FuzzEvent decodes arbitrary watch events.
func FuzzEvent(std *testing.F) {
	f := fuzzloop.Of(std)
	f.Add([]byte(`{"type":"ADDED","object":{"metadata":{"name":"n","uid":"u","resourceVersion":"5","annotations":{"culvert/pod-cidrs":"u 10.244.1.0/24","flannel.alpha.coreos.com/kube-subnet-manager":"true"}},"spec":{"podCIDRs":["10.244.1.0/24"]}}}`))
	f.Add([]byte(`{"type":"ERROR","object":{"kind":"Status","status":"Failure","message":"too old resource version","code":410}}`))
	cfg := config(f, vxlan46)
	f.Fuzz(func(t *testing.T, line []byte) {
		var e event
		if json.Unmarshal(line, &e) != nil {
			return
		}
		facts, _ := newNames(DefaultPrefix).facts(&e.Object.object)
		if l, err := facts.entry("n", cfg).Lease(); err == nil && (len(l.Endpoints) == 0 || l.Node != "n") {
			t.Errorf("%s became %+v", line, l)
		}
	})
}

// The Status in an ERROR event has a string named status, unlike a Node.
func TestErrorEvent(t *testing.T) {
	var e event
	err := json.Unmarshal([]byte(`{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"too old resource version: 1 (5)","reason":"Expired","code":410}}`), &e)
	if err != nil || e.Object.Code != 410 || !strings.Contains(e.Object.Message, "too old") {
		t.Errorf("%+v, %v", e, err)
	}
}

// Only the current context of a kubeconfig is read.
func TestKubeconfig(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "config")
	text := `apiVersion: v1
kind: Config
current-context: b
contexts:
- {name: a, context: {cluster: a, user: a}}
- {name: b, context: {cluster: b, user: b}}
clusters:
- {name: a, cluster: {server: "https://a.example:6443"}}
- name: b
  cluster: {server: "https://b.example:6443/prefix/", certificate-authority: ca.crt, tls-server-name: kubernetes}
users:
- {name: a, user: {exec: {command: program}}}
- {name: b, user: {client-certificate-data: Y2VydA==, client-key: /abs/key, tokenFile: token}}
`
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := readKubeconfig(name)
	if err != nil || a.server.Host != "b.example:6443" || a.caFile != filepath.Join(dir, "ca.crt") || a.serverName != "kubernetes" ||
		string(a.cert) != "cert" || a.keyFile != "/abs/key" || a.tokenFile != filepath.Join(dir, "token") || a.insecure {
		t.Errorf("%+v, %v", a, err)
	}
	for from, fault := range map[string]string{
		"current-context: b": "current-context: a", // credentials from a plugin
		"cluster: b, user":   "cluster: c, user",
		"https://b.example":  "::b",
	} {
		if a, err := parseKubeconfig([]byte(strings.Replace(text, from, fault, 1))); err == nil {
			t.Errorf("with %q: %+v", fault, a)
		}
	}
}

// BenchmarkHeartbeat decodes and compares a watch event that changes nothing.
func BenchmarkHeartbeat(b *testing.B) {
	const f = `"flannel.alpha.coreos.com/`
	line := []byte(`{"type":"MODIFIED","object":{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1","metadata":{"name":"n","uid":"u","resourceVersion":"5","creationTimestamp":"2026-01-02T03:04:05Z",
"annotations":{"culvert/pod-cidrs":"u 10.244.1.0/24",` + f + `kube-subnet-manager":"true",` + f + `backend-type":"vxlan",` + f + `backend-data":"{\"VNI\":1,\"VtepMAC\":\"c6:d2:32:6f:8f:44\"}",` + f + `public-ip":"192.0.2.1"},
"managedFields":[{"manager":"kubelet","operation":"Update","apiVersion":"v1","fieldsType":"FieldsV1","fieldsV1":{` + strings.Repeat(`"f:status":{"f:conditions":{"k:{\"type\":\"Ready\"}":{"f:lastHeartbeatTime":{}}}},`, 40) + `"f:x":{}}}]}}}`)
	cfg := config(b, vxlan4)
	keys := newNames(DefaultPrefix)
	r := &Registry{keys: keys, config: cfg}
	m := newMirror(r, subnet.Lease{Node: "self"})
	b.SetBytes(int64(len(line)))
	b.ReportAllocs()
	for b.Loop() {
		var e event
		if err := json.Unmarshal(line, &e); err != nil {
			b.Fatal(err)
		}
		facts, err := keys.facts(&e.Object.object)
		if err != nil {
			b.Fatal(err)
		}
		m.change("n", m.known("n", facts), false)
	}
}

// Errors from the API server say what to do; retryAfter says how long to wait.
func TestErrors(t *testing.T) {
	for _, c := range []struct {
		code         int
		header, body string
		part         string
		after        time.Duration
	}{
		{401, "", `{"kind":"Status","message":"Unauthorized","code":401}`, "service account", 0},
		{403, "", `{"message":"nodes is forbidden: User \"x\" cannot list resource \"nodes\""}`, "ClusterRole", 0},
		{429, "7", `{"message":"too many requests"}`, "throttles", 7 * time.Second},
		{429, "", `{"message":"too many requests","details":{"retryAfterSeconds":3}}`, "throttles", 3 * time.Second},
		{503, "9999", "<html>a proxy's page</html>", "a proxy's page", time.Minute},
		{500, "", "", "500", 0},
	} {
		header := http.Header{}
		if c.header != "" {
			header.Set("Retry-After", c.header)
		}
		err := errorOf(&http.Response{StatusCode: c.code, Header: header, Body: io.NopCloser(strings.NewReader(c.body))})
		if !strings.Contains(err.Error(), c.part) || !has(err, c.code) || retryAfter(fmt.Errorf("list: %w", err)) != c.after {
			t.Errorf("%d: %v, after %v", c.code, err, retryAfter(err))
		}
	}
}

// TestDisputed finds Nodes whose annotations claim podCIDRs of other Nodes.
func TestDisputed(t *testing.T) {
	node := func(fromSpec bool, cidrs ...string) facts {
		f := facts{managed: true, fromSpec: fromSpec}
		for _, c := range cidrs {
			f.cidrs = append(f.cidrs, netip.MustParsePrefix(c))
		}
		return f
	}
	ours := []netip.Prefix{netip.MustParsePrefix("10.244.0.0/24")}
	for name, c := range map[string]struct {
		nodes map[string]facts
		want  []string
	}{
		"apart":               {map[string]facts{"a": node(false, "10.244.1.0/24"), "b": node(false, "10.244.2.0/24", "fd00::/64")}, nil},
		"the same":            {map[string]facts{"a": node(false, "10.244.1.0/24"), "b": node(false, "10.244.1.0/24")}, []string{"a", "b"}},
		"one is sure":         {map[string]facts{"a": node(true, "10.244.1.0/24"), "b": node(false, "10.244.1.0/24")}, []string{"b"}},
		"ours":                {map[string]facts{"a": node(false, "10.244.0.0/25"), "b": node(false, "10.244.1.0/24")}, []string{"a"}},
		"all of it":           {map[string]facts{"a": node(false, "10.244.0.0/16"), "b": node(false, "10.244.1.0/24"), "c": node(true, "10.244.2.0/24"), "d": node(false, "10.245.1.0/24")}, []string{"a", "b"}},
		"in the other half":   {map[string]facts{"a": node(false, "10.244.1.0/24", "fd00:0:0:1::/64"), "b": node(false, "10.244.2.0/24", "fd00::/48")}, []string{"a", "b"}},
		"nobody runs there":   {map[string]facts{"a": node(false, "10.244.1.0/24"), "b": {cidrs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}}}, nil},
		"two groups in a row": {map[string]facts{"a": node(false, "10.244.1.0/24"), "b": node(false, "10.244.1.0/24"), "c": node(false, "10.244.2.0/24"), "d": node(false, "10.244.2.128/25")}, []string{"a", "b", "c", "d"}},
	} {
		got := disputed(c.nodes, ours)
		slices.Sort(got)
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: got %v, want %v", name, got, c.want)
		}
	}
}
