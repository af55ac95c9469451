package cni_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/cni"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// host is a node on which the test runs the compiled plugin as a container
// runtime does.
type host struct {
	*lab.Node
	bin string
	l   *lab.Lab
}

func newHost(t testing.TB, subnet string) host {
	t.Helper()
	bin := labtest.Bin(t)
	l := labtest.New(t, lab.Options{Bin: bin})
	h := host{Node: l.Nodes[0], bin: bin, l: l}
	h.lease(t, subnet)
	return h
}

// lease writes a subnet.env with the subnet.
func (h host) lease(t testing.TB, subnet string) {
	t.Helper()
	p := netip.MustParsePrefix(subnet)
	if err := cni.WriteSubnetEnv(h.SubnetFile(), cni.SubnetEnv{
		Networks: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")},
		Gateways: []netip.Prefix{netip.PrefixFrom(p.Addr().Next(), p.Bits())},
		MTU:      1450, IPMasq: true,
	}); err != nil {
		t.Fatal(err)
	}
}

func (h host) dataDir() string { return filepath.Join(h.StateDir, "culvert") }

func (h host) netconf() string {
	return fmt.Sprintf(`{"cniVersion":"1.1.0","name":"net","type":"culvert-cni","subnetFile":%q,"dataDir":%q,"ipam":{"dataDir":%q}}`,
		h.SubnetFile(), h.dataDir(), filepath.Join(h.StateDir, "networks"))
}

type call struct {
	verb, id, netns string
	ifname          string // "eth0" if empty
	stdin           string // the host's netconf if empty
	path            string // CNI_PATH; the built plugins if empty
	old             bool   // on a kernel that calls itself Linux 2.6
}

type answer struct {
	stdout, stderr string
	code           int          // exit code
	err            *types.Error // if the code is not 0
}

func (h host) run(t *testing.T, c call) answer {
	t.Helper()
	if c.ifname == "" {
		c.ifname = "eth0"
	}
	if c.stdin == "" {
		c.stdin = h.netconf()
	}
	if c.path == "" {
		c.path = filepath.Join(h.bin, "cni")
	}
	args := []string{filepath.Join(h.bin, "culvert-cni")}
	if c.old {
		args = append([]string{"/usr/bin/setarch", "--uname-2.6"}, args...)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = []string{
		"CNI_COMMAND=" + c.verb, "CNI_CONTAINERID=" + c.id, "CNI_NETNS=" + c.netns,
		"CNI_IFNAME=" + c.ifname, "CNI_PATH=" + c.path,
	}
	cmd.Stdin = strings.NewReader(c.stdin)
	var out, errout bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errout
	err := h.Do(cmd.Run)
	a := answer{stdout: out.String(), stderr: errout.String()}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		a.code = exit.ExitCode()
		a.err = &types.Error{}
		if err := json.Unmarshal(out.Bytes(), a.err); err != nil {
			t.Fatalf("%+v failed with the standard output %q", c, a.stdout)
		}
	} else if err != nil {
		t.Fatal(err)
	}
	return a
}

func (h host) must(t *testing.T, c call) answer {
	t.Helper()
	a := h.run(t, c)
	if a.code != 0 {
		t.Fatalf("%s %s: %v\n%s", c.verb, c.id, a.err, a.stderr)
	}
	return a
}

// records and addresses return the records of the plugin and the reservations of
// host-local.
func (h host) records() []string {
	return slices.DeleteFunc(names(h.dataDir()), func(n string) bool { return n == ".lock" })
}

func (h host) addresses() []string {
	return slices.DeleteFunc(names(filepath.Join(h.StateDir, "networks", "net")), func(n string) bool {
		return n == "lock" || strings.HasPrefix(n, "last_reserved_ip")
	})
}

func names(dir string) []string {
	entries, _ := os.ReadDir(dir)
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func (h host) expect(t *testing.T, when string, records, addresses []string) {
	t.Helper()
	if got := h.records(); !slices.Equal(got, records) {
		t.Errorf("%s: the records are %q, want %q", when, got, records)
	}
	if got := h.addresses(); !slices.Equal(got, addresses) {
		t.Errorf("%s: the reserved addresses are %q, want %q", when, got, addresses)
	}
}

var sandboxes atomic.Int64

// sandbox creates a pod's namespace without calling a plugin.
func sandbox(t testing.TB, h host) *lab.Namespace {
	t.Helper()
	ns, err := h.l.AddNamespace("s" + fmt.Sprint(sandboxes.Add(1)))
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

func links(t *testing.T, ns *lab.Namespace) []string {
	t.Helper()
	var out []string
	err := ns.Do(func() error {
		all, err := netlink.LinkList()
		for _, l := range all {
			out = append(out, l.Attrs().Name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// linksOnce waits until there are n links, at most 20 s, and returns them: the kernel
// removes the links of a deleted namespace asynchronously.
func linksOnce(t *testing.T, ns *lab.Namespace, n int) []string {
	t.Helper()
	got := links(t, ns)
	for end := time.Now().Add(20 * time.Second); len(got) != n && time.Now().Before(end); got = links(t, ns) {
		time.Sleep(20 * time.Millisecond)
	}
	return got
}

func TestAddCheckDel(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	ns := sandbox(t, h)
	add := h.must(t, call{verb: "ADD", id: "c1", netns: ns.Path})
	result, err := types100.NewResult([]byte(add.stdout))
	if err != nil {
		t.Fatal(err)
	}
	got := result.(*types100.Result)
	if len(got.IPs) != 1 || got.IPs[0].Address.String() != "10.42.7.2/24" || got.IPs[0].Gateway.String() != "10.42.7.1" {
		t.Errorf("the pod got %s", add.stdout)
	}
	h.expect(t, "after ADD", []string{"c1:eth0"}, []string{"10.42.7.2"})
	err = ns.Do(func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err == nil && eth0.Attrs().MTU != 1450 {
			err = fmt.Errorf("MTU %d", eth0.Attrs().MTU)
		}
		return err
	})
	if err != nil {
		t.Errorf("the pod's eth0: %v", err)
	}

	// CHECK and DEL receive the result of ADD.
	conf := strings.TrimSuffix(h.netconf(), "}") + `,"prevResult":` + add.stdout + "}"
	h.must(t, call{verb: "CHECK", id: "c1", netns: ns.Path, stdin: conf})
	if a := h.run(t, call{verb: "CHECK", id: "other", netns: ns.Path, stdin: conf}); a.err == nil || a.err.Code != types.ErrUnknownContainer {
		t.Errorf("CHECK of an unknown container: %v", a.err)
	}
	h.lease(t, "10.42.9.0/24")
	if a := h.run(t, call{verb: "CHECK", id: "c1", netns: ns.Path, stdin: conf}); a.err == nil || !strings.Contains(a.err.Msg, "10.42.7.2 is no longer in this node's subnet") {
		t.Errorf("CHECK after the node got another subnet: %v", a.err)
	}
	h.lease(t, "10.42.7.0/24")
	if err := ns.Do(func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkDel(eth0)
	}); err != nil {
		t.Fatal(err)
	}
	if a := h.run(t, call{verb: "CHECK", id: "c1", netns: ns.Path, stdin: conf}); a.err == nil {
		t.Error("CHECK succeeded without the pod's interface")
	}

	for range 2 {
		h.must(t, call{verb: "DEL", id: "c1", netns: ns.Path, stdin: conf})
		h.expect(t, "after DEL", nil, nil)
	}
}

func TestDelWithoutNamespace(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	ordinary := filepath.Join(t.TempDir(), "was-a-namespace")
	if err := os.WriteFile(ordinary, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, netns := range []string{"", "/run/netns/never-was", ordinary} {
		ns := sandbox(t, h)
		h.must(t, call{verb: "ADD", id: "c1", netns: ns.Path})
		h.must(t, call{verb: "DEL", id: "c1", netns: netns})
		h.expect(t, fmt.Sprintf("after DEL with netns %q", netns), nil, nil)
		h.must(t, call{verb: "DEL", id: "never-added", netns: netns})
		if err := ns.Delete(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFailedAddIsUndone(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	first, second := sandbox(t, h), (*lab.Namespace)(nil)
	h.must(t, call{verb: "ADD", id: "c1", netns: first.Path})
	second = sandbox(t, h)

	// With an unreachable gateway, bridge fails after it has created the interface
	// and reserved an address.
	stdin := strings.Replace(h.netconf(), `"ipam":{`, `"ipam":{"routes":[{"dst":"192.0.2.0/24","gw":"203.0.113.1"}],`, 1)
	a := h.run(t, call{verb: "ADD", id: "c2", netns: second.Path, stdin: stdin})
	if a.err == nil || !strings.Contains(a.err.Msg, "delegate bridge: ADD: ") {
		t.Fatalf("ADD with an impossible route: %v", a.err)
	}
	h.expect(t, "after the failed ADD", []string{"c1:eth0"}, []string{"10.42.7.2"})
	if got := links(t, second); slices.Contains(got, "eth0") {
		t.Errorf("the failed ADD left %v in the pod", got)
	}
	if got := linksOnce(t, h.Namespace, 4); len(got) != 4 { // lo, eth0, cni0, c1's
		t.Errorf("the node has the links %v", got)
	}
}

func TestFailedDelKeepsItsRecord(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	ns := sandbox(t, h)
	h.must(t, call{verb: "ADD", id: "c1", netns: ns.Path})
	empty := t.TempDir()
	if a := h.run(t, call{verb: "DEL", id: "c1", netns: ns.Path, path: empty}); a.err == nil || !strings.Contains(a.err.Msg, `"bridge"`) {
		t.Errorf("DEL without a delegate: %v", a.err)
	}
	h.expect(t, "after the failed DEL", []string{"c1:eth0"}, []string{"10.42.7.2"})
	// DEL needs neither the daemon nor subnet.env.
	if err := os.Remove(h.SubnetFile()); err != nil {
		t.Fatal(err)
	}
	h.must(t, call{verb: "DEL", id: "c1", netns: ns.Path})
	h.expect(t, "after DEL", nil, nil)
}

func TestFailedUndoKeepsItsRecord(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	ns := sandbox(t, h)
	// A delegate that always fails.
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "bridge"), []byte("#!/bin/sh\necho broken >&2\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	a := h.run(t, call{verb: "ADD", id: "c1", netns: ns.Path, path: dir})
	if a.err == nil || !strings.Contains(a.stderr, "rolling back the failed ADD of c1") {
		t.Errorf("ADD: %v, and on standard error %q", a.err, a.stderr)
	}
	h.expect(t, "after a failed ADD and a failed rollback", []string{"c1:eth0"}, nil)
	h.must(t, call{verb: "DEL", id: "c1", netns: ns.Path})
	h.expect(t, "after DEL", nil, nil)
}

func TestSecondAdd(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	ns := sandbox(t, h)
	h.must(t, call{verb: "ADD", id: "c1", netns: ns.Path})
	if a := h.run(t, call{verb: "ADD", id: "c1", netns: ns.Path}); a.err == nil || !strings.Contains(a.err.Msg, "already had an ADD of eth0") {
		t.Errorf("the same ADD again: %v", a.err)
	}
	if got := links(t, ns); !slices.Contains(got, "eth0") {
		t.Errorf("the second ADD removed the interface of the first: %v", got)
	}
	h.must(t, call{verb: "ADD", id: "c1", netns: ns.Path, ifname: "eth1"})
	h.expect(t, "after ADDs of two interfaces", []string{"c1:eth0", "c1:eth1"}, []string{"10.42.7.2", "10.42.7.3"})
	h.must(t, call{verb: "DEL", id: "c1", netns: ns.Path})
	h.expect(t, "after DEL of one", []string{"c1:eth1"}, []string{"10.42.7.3"})

	// The same container in a new namespace without a DEL, as after a reboot.
	after := sandbox(t, h)
	h.must(t, call{verb: "ADD", id: "c1", netns: after.Path, ifname: "eth1"})
	h.expect(t, "after ADD in a new namespace", []string{"c1:eth1"}, []string{"10.42.7.4"})
}

func TestDelOfFlannelsPod(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	ns := sandbox(t, h)
	h.must(t, call{verb: "ADD", id: "c1", netns: ns.Path})
	// Replace the record by one in the format of flannel's plugin.
	text, err := os.ReadFile(filepath.Join(h.dataDir(), "c1:eth0"))
	if err != nil {
		t.Fatal(err)
	}
	var r struct{ Delegate json.RawMessage }
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(h.dataDir(), "c1"), r.Delegate, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(h.dataDir(), "c1:eth0")); err != nil {
		t.Fatal(err)
	}
	h.must(t, call{verb: "DEL", id: "c1", netns: ns.Path})
	h.expect(t, "after DEL", nil, nil)
}

func TestDamagedRecord(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	ns := sandbox(t, h)
	h.must(t, call{verb: "ADD", id: "c1", netns: ns.Path})
	if err := os.WriteFile(filepath.Join(h.dataDir(), "c1:eth0"), []byte(`{"cont`), 0o600); err != nil {
		t.Fatal(err)
	}
	h.must(t, call{verb: "DEL", id: "c1", netns: ns.Path})
	h.expect(t, "after DEL", nil, nil)
}

func TestRefusals(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	ns := sandbox(t, h)
	conf := func(from, to string) string { return strings.Replace(h.netconf(), from, to, 1) }
	readonly := "/proc/culvert" // a directory that cannot be created
	for _, c := range []struct {
		call
		code uint
		says string
	}{
		{call{verb: "ADD", id: "../../etc/passwd", netns: ns.Path}, types.ErrInvalidEnvironmentVariables, "containerID"},
		{call{verb: "DEL", id: "a/../../b"}, types.ErrInvalidEnvironmentVariables, "containerID"},
		{call{verb: "ADD", id: strings.Repeat("x", 300), netns: ns.Path}, types.ErrInvalidEnvironmentVariables, "more than 220"},
		{call{verb: "ADD", id: "c1", netns: ns.Path, ifname: "../eth0"}, types.ErrInvalidEnvironmentVariables, "interface name"},
		{call{verb: "ADD", id: "c1"}, types.ErrInvalidEnvironmentVariables, "CNI_NETNS"},
		{call{verb: "FROB", id: "c1"}, types.ErrInvalidEnvironmentVariables, "unknown CNI_COMMAND"},
		{call{verb: "ADD", id: "c1", netns: ns.Path, stdin: "{"}, types.ErrDecodingFailure, ""},
		{call{verb: "ADD", id: "c1", netns: ns.Path, stdin: conf(`"net"`, `"../net"`)}, types.ErrInvalidNetworkConfig, ""},
		{call{verb: "ADD", id: "c1", netns: ns.Path, stdin: conf("1.1.0", "9.9.9")}, types.ErrIncompatibleCNIVersion, ""},
		{call{verb: "ADD", id: "c1", netns: ns.Path, stdin: conf(h.SubnetFile(), "/nowhere/subnet.env")}, types.ErrTryAgainLater, "no lease yet"},
		{call{verb: "STATUS", stdin: conf(h.SubnetFile(), "/nowhere/subnet.env")}, 50, "no lease yet"},
		{call{verb: "ADD", id: "c1", netns: ns.Path, stdin: conf(h.SubnetFile(), "/proc/version")}, types.ErrInvalidNetworkConfig, "not KEY=VALUE"},
		{call{verb: "ADD", id: "c1", netns: ns.Path, stdin: conf(h.dataDir(), readonly)}, types.ErrIOFailure, "state directory"},
	} {
		a := h.run(t, c.call)
		if a.err == nil || a.err.Code != c.code || !strings.Contains(a.err.Error(), c.says) {
			t.Errorf("%s %.30q: %+v, want code %d and %q", c.verb, c.id, a.err, c.code, c.says)
		}
	}
	h.expect(t, "after refusals", nil, nil)
	if got := links(t, ns); len(got) != 1 {
		t.Errorf("the pod has %v after refusals", got)
	}
	for _, verb := range []string{"VERSION", "STATUS", "GC"} {
		h.must(t, call{verb: verb})
	}
}

// Without space for a record, ADD does not call the delegate.
func TestFullStateDirectory(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	ns := sandbox(t, h)
	if err := os.Mkdir(h.dataDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", h.dataDir(), "tmpfs", 0, "nr_inodes=1"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(h.dataDir(), 0); err != nil {
			t.Error(err)
		}
	}()
	if a := h.run(t, call{verb: "ADD", id: "c1", netns: ns.Path}); a.err == nil || a.err.Code != types.ErrIOFailure {
		t.Errorf("ADD without room for state: %v", a.err)
	}
	h.expect(t, "after the refusal", nil, nil)
}

// A dual-stack pod gets an address of each family, or the addresses and the MAC that
// the runtime requests by capability.
func TestDualStackAndRuntimeConfig(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	if err := cni.WriteSubnetEnv(h.SubnetFile(), cni.SubnetEnv{
		Networks: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd00:42::/48")},
		Gateways: []netip.Prefix{netip.MustParsePrefix("10.42.7.1/24"), netip.MustParsePrefix("fd00:42:0:7::1/64")},
		MTU:      1430, IPMasq: true,
	}); err != nil {
		t.Fatal(err)
	}
	asked := strings.TrimSuffix(h.netconf(), "}") + `,"delegate":{"capabilities":{"ips":true,"mac":true}},"runtimeConfig":{"ips":["10.42.7.77/24","fd00:42:0:7::77/64"],"mac":"02:42:00:00:00:77"}}`
	for _, c := range []struct {
		id, stdin string
		addrs     []string
		mac       string
	}{
		{"any", h.netconf(), []string{"10.42.7.2/24", "fd00:42:0:7::2/64"}, ""},
		{"promised", asked, []string{"10.42.7.77/24", "fd00:42:0:7::77/64"}, "02:42:00:00:00:77"},
	} {
		id, ns := c.id, sandbox(t, h)
		add := h.must(t, call{verb: "ADD", id: id, netns: ns.Path, stdin: c.stdin})
		result, err := types100.NewResult([]byte(add.stdout))
		if err != nil {
			t.Fatal(err)
		}
		var addrs []string
		mac := ""
		for _, ip := range result.(*types100.Result).IPs {
			addrs = append(addrs, ip.Address.String())
		}
		for _, i := range result.(*types100.Result).Interfaces {
			if i.Sandbox != "" && c.mac != "" {
				mac = i.Mac
			}
		}
		if !slices.Equal(addrs, c.addrs) || mac != c.mac {
			t.Errorf("%s: the pod has %v and MAC %q, want %v and %q", id, addrs, mac, c.addrs, c.mac)
		}
		prev := strings.TrimSuffix(c.stdin, "}") + `,"prevResult":` + add.stdout + "}"
		h.must(t, call{verb: "CHECK", id: id, netns: ns.Path, stdin: prev})
	}
	// The subnet of one family changes.
	if err := cni.WriteSubnetEnv(h.SubnetFile(), cni.SubnetEnv{
		Networks: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd00:42::/48")},
		Gateways: []netip.Prefix{netip.MustParsePrefix("10.42.7.1/24"), netip.MustParsePrefix("fd00:42:0:8::1/64")},
		MTU:      1430, IPMasq: true,
	}); err != nil {
		t.Fatal(err)
	}
	third := sandbox(t, h)
	if a := h.run(t, call{verb: "ADD", id: "third", netns: third.Path}); a.err == nil || !strings.Contains(a.err.Msg, "has the address fd00:42:0:7::1/64, but this node's subnet is fd00:42:0:8::/64 now") {
		t.Errorf("ADD beside pods of another IPv6 subnet: %v", a.err)
	}
	for _, id := range []string{"any", "promised"} {
		h.must(t, call{verb: "DEL", id: id})
	}
	h.expect(t, "after DEL", nil, nil)
}

// With a read-only state directory, ADD fails before it calls the delegate, DEL
// afterwards; both succeed later.
func TestReadOnlyStateDirectory(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	first, second := sandbox(t, h), sandbox(t, h)
	if err := os.Mkdir(h.dataDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", h.dataDir(), "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(h.dataDir(), 0); err != nil {
			t.Error(err)
		}
	}()
	h.must(t, call{verb: "ADD", id: "c1", netns: first.Path})
	if err := unix.Mount("", h.dataDir(), "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	for _, c := range []call{{verb: "ADD", id: "c2", netns: second.Path}, {verb: "DEL", id: "c1", netns: first.Path}} {
		if a := h.run(t, c); a.err == nil || a.err.Code != types.ErrIOFailure || !strings.Contains(a.err.Details, "read-only") {
			t.Errorf("%s: %+v", c.verb, a.err)
		}
	}
	h.expect(t, "while it is read-only", []string{"c1:eth0"}, nil)
	if got := links(t, second); slices.Contains(got, "eth0") {
		t.Errorf("the container has %v after a failed ADD", got)
	}
	if err := unix.Mount("", h.dataDir(), "", unix.MS_REMOUNT, ""); err != nil {
		t.Fatal(err)
	}
	h.must(t, call{verb: "DEL", id: "c1", netns: first.Path})
	h.must(t, call{verb: "ADD", id: "c2", netns: second.Path})
	h.expect(t, "when it is writable again", []string{"c2:eth0"}, []string{"10.42.7.3"})
}
