package cni_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/types/create"
)

// raw runs the compiled plugin with exactly the given environment and input.
func (h host) raw(t *testing.T, env []string, stdin string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := exec.Command(filepath.Join(h.bin, "culvert-cni"))
	cmd.Env = env
	cmd.Stdin = strings.NewReader(stdin)
	var out, errout bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errout
	err := h.Do(cmd.Run)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		code = exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	return out.String(), errout.String(), code
}

// versions are the versions of the specification, oldest first, and what they have.
var versions = []struct {
	version           string
	ips               bool // results have "ips"
	ipVersion         bool // with a "version"
	check, gc, status bool
}{
	{version: "0.1.0"},
	{version: "0.2.0"},
	{version: "0.3.0", ips: true, ipVersion: true},
	{version: "0.3.1", ips: true, ipVersion: true},
	{version: "0.4.0", ips: true, ipVersion: true, check: true},
	{version: "1.0.0", ips: true, check: true},
	{version: "1.1.0", ips: true, check: true, gc: true, status: true},
}

// TestSpecVersions calls the verbs of SPEC.md in every version:
//
//	VERSION → STATUS → ADD → CHECK → GC (valid) → DEL → DEL → GC
//
// A verb that the version does not have fails with code 1.
func TestSpecVersions(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	ns := sandbox(t, h)
	out, _, code := h.raw(t, []string{"CNI_COMMAND=VERSION"}, "")
	var says struct {
		CNIVersion        string
		SupportedVersions []string
	}
	if err := json.Unmarshal([]byte(out), &says); err != nil || code != 0 {
		t.Fatalf("VERSION: code %d, %s", code, out)
	}
	if says.CNIVersion != "1.1.0" {
		t.Errorf("VERSION reports cniVersion %s", says.CNIVersion)
	}
	for _, v := range versions {
		t.Run(v.version, func(t *testing.T) {
			if !slices.Contains(says.SupportedVersions, v.version) {
				t.Errorf("VERSION does not list it: %s", out)
			}
			conf := strings.Replace(h.netconf(), "1.1.0", v.version, 1)
			verb := func(verb, stdin string, has bool) string {
				t.Helper()
				env := []string{"CNI_COMMAND=" + verb, "CNI_PATH=" + filepath.Join(h.bin, "cni")}
				if verb == "ADD" || verb == "CHECK" || verb == "DEL" {
					env = append(env, "CNI_CONTAINERID=c1", "CNI_IFNAME=eth0", "CNI_NETNS="+ns.Path)
				}
				stdout, stderr, code := h.raw(t, env, stdin)
				switch e := (types.Error{}); {
				case has && code != 0:
					t.Fatalf("%s: code %d, %s%s", verb, code, stdout, stderr)
				case has && verb != "ADD" && stdout != "":
					t.Errorf("%s has the standard output %q", verb, stdout)
				case !has && (code == 0 || json.Unmarshal([]byte(stdout), &e) != nil || e.Code != types.ErrIncompatibleCNIVersion):
					t.Errorf("%s succeeded: code %d, %s", verb, code, stdout)
				}
				return stdout
			}
			verb("STATUS", conf, v.status)
			added := verb("ADD", conf, true)
			if r, err := create.Create(v.version, []byte(added)); err != nil || r.Version() != v.version {
				t.Errorf("the result is not of this version: %v\n%s", err, added)
			}
			var result struct {
				CNIVersion string `json:"cniVersion"`
				IPs        []struct{ Version, Address, Gateway string }
				IP4        *struct{ IP string }
				Interfaces []struct{ Name, Sandbox string }
			}
			if err := json.Unmarshal([]byte(added), &result); err != nil {
				t.Fatal(err)
			}
			switch {
			case v.ips && (len(result.IPs) != 1 || (result.IPs[0].Version == "4") != v.ipVersion || result.IPs[0].Gateway != "10.42.7.1"):
				t.Errorf("ips: %s", added)
			case v.ips && !slices.ContainsFunc(result.Interfaces, func(i struct{ Name, Sandbox string }) bool { return i.Name == "eth0" && i.Sandbox == ns.Path }):
				t.Errorf("interfaces: %s", added)
			case !v.ips && (result.IP4 == nil || !strings.HasPrefix(result.IP4.IP, "10.42.7.")):
				t.Errorf("ip4: %s", added)
			}
			withPrev := strings.TrimSuffix(conf, "}") + `,"prevResult":` + added + "}"
			verb("CHECK", withPrev, v.check)
			valid := strings.TrimSuffix(conf, "}") + `,"cni.dev/valid-attachments":[{"containerID":"c1","ifname":"eth0"}]}`
			verb("GC", valid, v.gc)
			if v.check {
				verb("CHECK", withPrev, true)
			}
			if v.ips {
				verb("DEL", withPrev, true)
			}
			verb("DEL", conf, true)
			verb("DEL", conf, true)
			h.expect(t, "after DEL", nil, nil)
		})
	}
}

// TestSpecErrors calls the plugin in every invalid way and expects the code of
// SPEC.md. A failed ADD leaves nothing behind.
func TestSpecErrors(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	ns := sandbox(t, h)
	own := h.Namespace.Path
	ordinary := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(ordinary, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	expired := filepath.Join(t.TempDir(), "subnet.env")
	if err := os.WriteFile(expired, []byte("FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.7.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\nCULVERT_LEASE_EXPIRES=2026-01-02T03:04:05Z\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	is := func(pairs ...string) map[string]string {
		m := map[string]string{}
		for i := 0; i < len(pairs); i += 2 {
			m[pairs[i]] = pairs[i+1]
		}
		return m
	}
	conf := func(from, to string) string { return strings.Replace(h.netconf(), from, to, 1) }
	type table struct {
		verbs []string
		env   map[string]string // overrides the valid ones; "-" removes one
		stdin string            // default: a valid one
		code  uint
		says  string
	}
	container, all := []string{"ADD", "CHECK", "DEL"}, []string{"ADD", "CHECK", "DEL", "GC", "STATUS"}
	for _, c := range []table{
		// 1: incompatible version
		{all, nil, conf("1.1.0", "9.9.9"), types.ErrIncompatibleCNIVersion, ""},
		{[]string{"CHECK"}, nil, conf("1.1.0", "0.3.1"), types.ErrIncompatibleCNIVersion, "does not allow CHECK"},
		{[]string{"GC"}, nil, conf("1.1.0", "1.0.0"), types.ErrIncompatibleCNIVersion, "does not allow GC"},
		{[]string{"STATUS"}, nil, conf("1.1.0", "1.0.0"), types.ErrIncompatibleCNIVersion, "does not allow STATUS"},
		// 3: unknown container
		{[]string{"CHECK"}, nil, "", types.ErrUnknownContainer, "container c1 has no record of an ADD of eth0"},
		// 4: the environment
		{container, is("CNI_CONTAINERID", "-"), "", types.ErrInvalidEnvironmentVariables, "CNI_CONTAINERID"},
		{container, is("CNI_IFNAME", "-"), "", types.ErrInvalidEnvironmentVariables, "CNI_IFNAME"},
		{[]string{"ADD", "CHECK"}, is("CNI_NETNS", "-"), "", types.ErrInvalidEnvironmentVariables, "CNI_NETNS"},
		{all, is("CNI_PATH", "-"), "", types.ErrInvalidEnvironmentVariables, "CNI_PATH"},
		{container, is("CNI_CONTAINERID", "-", "CNI_IFNAME", "-", "CNI_PATH", "-"), "", types.ErrInvalidEnvironmentVariables, "CNI_CONTAINERID,CNI_IFNAME,CNI_PATH"},
		{container, is("CNI_CONTAINERID", "../../etc/passwd"), "", types.ErrInvalidEnvironmentVariables, "containerID"},
		{container, is("CNI_CONTAINERID", "a/../../b"), "", types.ErrInvalidEnvironmentVariables, "containerID"},
		{container, is("CNI_CONTAINERID", "."), "", types.ErrInvalidEnvironmentVariables, "containerID"},
		{container, is("CNI_CONTAINERID", "a:b"), "", types.ErrInvalidEnvironmentVariables, "containerID"},
		{container, is("CNI_CONTAINERID", "a\nb"), "", types.ErrInvalidEnvironmentVariables, "containerID"},
		{container, is("CNI_CONTAINERID", strings.Repeat("x", 4096)), "", types.ErrInvalidEnvironmentVariables, "more than 220"},
		{container, is("CNI_IFNAME", "../eth0"), "", types.ErrInvalidEnvironmentVariables, "interface name"},
		{container, is("CNI_IFNAME", ".."), "", types.ErrInvalidEnvironmentVariables, "interface name"},
		{container, is("CNI_IFNAME", "sixteencharacter"), "", types.ErrInvalidEnvironmentVariables, "interface name"},
		{[]string{"FROB", "add"}, nil, "", types.ErrInvalidEnvironmentVariables, "unknown CNI_COMMAND"},
		// 5: I/O
		{[]string{"ADD"}, nil, conf(h.dataDir(), "/proc/culvert"), types.ErrIOFailure, "state directory"},
		{[]string{"GC"}, nil, conf(h.dataDir(), "/proc/culvert"), types.ErrIOFailure, "state directory"},
		// 6: decoding
		{all, nil, "{", types.ErrDecodingFailure, ""},
		{all, nil, " ", types.ErrDecodingFailure, ""},
		{all, nil, "null{}", types.ErrDecodingFailure, ""},
		{all, nil, "[]", types.ErrDecodingFailure, ""},
		{all, nil, "\x00\xff", types.ErrDecodingFailure, ""},
		{all, nil, strings.Repeat("[", 100000), types.ErrDecodingFailure, ""},
		{all, nil, `{"name":"` + strings.Repeat("x", 17<<20) + `"}`, types.ErrDecodingFailure, "longer than"},
		{all, nil, conf(`"1.1.0"`, "11"), types.ErrDecodingFailure, ""},
		{all, nil, conf(`"ipam":{`, `"ipam":[],"was":{`), types.ErrDecodingFailure, "network configuration"},
		{[]string{"GC"}, nil, conf(`{`, `{"cni.dev/valid-attachments":"all",`), types.ErrDecodingFailure, "valid-attachments"},
		// 7: the network configuration
		{all, nil, conf(`"net"`, `"../net"`), types.ErrInvalidNetworkConfig, "network name"},
		{all, nil, conf(`"name":"net",`, ""), types.ErrInvalidNetworkConfig, "missing network name"},
		{all, nil, conf(`"ipam":{`, `"delegate":{"type":"../../bin/sh"},"ipam":{`), types.ErrInvalidNetworkConfig, "no slashes"},
		{all, nil, conf(`"ipam":{`, `"ipam":{"type":"/bin/sh",`), types.ErrInvalidNetworkConfig, "no slashes"},
		{all, nil, conf(`"ipam":{`, `"delegate":{"name":"x"},"ipam":{`), types.ErrInvalidNetworkConfig, `"name"`},
		{all, nil, conf(h.SubnetFile(), "subnet.env"), types.ErrInvalidNetworkConfig, "not an absolute path"},
		{[]string{"ADD"}, nil, conf(h.SubnetFile(), "/proc/version"), types.ErrInvalidNetworkConfig, "not KEY=VALUE"},
		{[]string{"ADD"}, nil, conf(h.SubnetFile(), "/dev/zero"), types.ErrInvalidNetworkConfig, "not a regular file"},
		{[]string{"GC"}, nil, conf(`{`, `{"cni.dev/valid-attachments":[{"ifname":"eth0"}],`), types.ErrInvalidNetworkConfig, "without a containerID"},
		// 8: the namespace
		{[]string{"ADD"}, is("CNI_NETNS", "/run/netns/never-was"), "", types.ErrInvalidNetNS, "not a network namespace"},
		{[]string{"ADD"}, is("CNI_NETNS", ordinary), "", types.ErrInvalidNetNS, "not a network namespace"},
		{[]string{"ADD"}, is("CNI_NETNS", own), "", types.ErrInvalidNetNS, "the plugin runs in"},
		// 11: try again later
		{[]string{"ADD"}, nil, conf(h.SubnetFile(), "/nowhere/subnet.env"), types.ErrTryAgainLater, "no lease yet"},
		{[]string{"ADD"}, nil, conf(h.SubnetFile(), expired), types.ErrTryAgainLater, "expired at 2026-01-02T03:04:05Z"},
		// 50: not available
		{[]string{"STATUS"}, nil, conf(h.SubnetFile(), "/nowhere/subnet.env"), 50, "no lease yet"},
		{[]string{"STATUS"}, nil, conf(h.SubnetFile(), expired), 50, "expired at 2026-01-02T03:04:05Z"},
		{[]string{"STATUS"}, is("CNI_PATH", "/nowhere"), "", 50, `delegate "bridge"`},
		// 999: errors without a code in the specification
		{[]string{"ADD"}, is("CNI_PATH", "/nowhere"), "", types.ErrInternal, `delegate "bridge"`},
	} {
		for _, verb := range c.verbs {
			env := map[string]string{
				"CNI_COMMAND": verb, "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0",
				"CNI_NETNS": ns.Path, "CNI_PATH": filepath.Join(h.bin, "cni"),
			}
			for k, v := range c.env {
				env[k] = v
			}
			var list []string
			for k, v := range env {
				if v != "-" {
					list = append(list, k+"="+v)
				}
			}
			stdin := c.stdin
			if stdin == "" {
				stdin = h.netconf()
			}
			name := fmt.Sprintf("%s %v %.60q", verb, c.env, c.stdin)
			stdout, stderr, code := h.raw(t, list, stdin)
			var e types.Error
			d := json.NewDecoder(strings.NewReader(stdout))
			d.DisallowUnknownFields()
			if err := d.Decode(&struct {
				CNIVersion string `json:"cniVersion"`
				*types.Error
			}{Error: &e}); err != nil || code != 1 {
				t.Errorf("%s: exit code %d, standard output %.200q: %v", name, code, stdout, err)
				continue
			}
			if e.Code != c.code || !strings.Contains(e.Error(), c.says) {
				t.Errorf("%s: code %d, %q; want code %d and %q", name, e.Code, e.Error(), c.code, c.says)
			}
			if stderr != "" && !strings.HasPrefix(stderr, "culvert-cni: ") {
				t.Errorf("%s: standard error %q", name, stderr)
			}
		}
	}
	h.expect(t, "after refusals", nil, nil)
	if got := links(t, ns); len(got) != 1 {
		t.Errorf("the pod has %v after refusals", got)
	}
	if got := linksOnce(t, h.Namespace, 2); len(got) != 2 { // lo and eth0
		t.Errorf("the node has %v after refusals", got)
	}

	// Started by hand.
	stdout, stderr, code := h.raw(t, nil, "")
	if code != 0 || stdout != "" || !strings.Contains(stderr, "CNI plugin culvert-cni of culvert") || !strings.Contains(stderr, "1.1.0") {
		t.Errorf("started by hand: code %d, %q, %q", code, stdout, stderr)
	}
}
