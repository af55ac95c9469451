//go:build system

package system

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"culvert/cni"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

// chain is a configuration list that uses every feature: addresses, port
// mappings, rates, sysctls.
func chain(n *lab.Node, backend string) ([]byte, error) {
	return json.Marshal(map[string]any{
		"name": "chain", "cniVersion": "1.0.0", "cniVersions": []string{"0.4.0", "1.0.0", "1.1.0"},
		"plugins": []any{
			map[string]any{
				"type": "culvert-cni", "subnetFile": n.SubnetFile(), "dataDir": filepath.Join(n.StateDir, "culvert"),
				"ipam":     map[string]any{"dataDir": filepath.Join(n.StateDir, "networks")},
				"delegate": map[string]any{"hairpinMode": true, "isDefaultGateway": true},
			},
			map[string]any{"type": "portmap", "backend": backend, "capabilities": map[string]bool{"portMappings": true}},
			map[string]any{"type": "bandwidth", "capabilities": map[string]bool{"bandwidth": true}},
			map[string]any{"type": "tuning", "sysctl": map[string]string{"net.ipv4.conf.IFNAME.arp_filter": "1"}},
		},
	})
}

// leaseSubnet writes a node's subnet.env, as its daemon would.
func leaseSubnet(t *testing.T, n *lab.Node, subnet string) {
	t.Helper()
	p := netip.MustParsePrefix(subnet)
	if err := cni.WriteSubnetEnv(n.SubnetFile(), cni.SubnetEnv{
		Networks: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")},
		Gateways: []netip.Prefix{netip.PrefixFrom(p.Addr().Next(), p.Bits())},
		MTU:      1450, IPMasq: true,
	}); err != nil {
		t.Fatal(err)
	}
}

// held returns the addresses that host-local holds on a node.
func held(n *lab.Node, network string) []string {
	entries, _ := os.ReadDir(filepath.Join(n.StateDir, "networks", network))
	var out []string
	for _, e := range entries {
		if _, err := netip.ParseAddr(e.Name()); err == nil {
			out = append(out, e.Name())
		}
	}
	return out
}

func kept(n *lab.Node) []string {
	entries, _ := os.ReadDir(filepath.Join(n.StateDir, "culvert"))
	var out []string
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			out = append(out, e.Name())
		}
	}
	return out
}

// rules returns all packet filter rules on a node.
func rules(t *testing.T, n *lab.Node) string {
	t.Helper()
	var all string
	for _, c := range [][]string{{"iptables", "-t", "nat", "-S"}, {"nft", "list", "ruleset"}} {
		out, err := n.Run(t.Context(), c[0], c[1:]...)
		if err != nil {
			t.Fatal(err)
		}
		all += string(out)
	}
	return all
}

// say sends one line to each client of a port in a pod.
func say(t *testing.T, ns *lab.Namespace, port int, line string) {
	t.Helper()
	l, err := ns.Listen(t.Context(), "tcp", fmt.Sprintf(":%d", port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, line)
			_ = c.Close()
		}
	}()
}

// hear connects and returns what the server sends.
func hear(ns *lab.Namespace, address string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	c, err := ns.DialWith(ctx, net.Dialer{}, "tcp", address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	b, err := io.ReadAll(c)
	return string(b), err
}

// TestCNIChain runs the whole chain through libcni, with each packet filter:
//
//	fabric ──► n1:8080 ──(portmap)──► live:80
//	           n1:8081 ──(portmap)──► leaked:80, whose runtime lost its record
func TestCNIChain(t *testing.T) {
	for _, backend := range []string{"iptables", "nftables"} {
		t.Run(backend, func(t *testing.T) {
			l := labtest.New(t, lab.Options{Conflist: func(n *lab.Node) ([]byte, error) { return chain(n, backend) }})
			n := l.Nodes[0]
			leaseSubnet(t, n, "10.42.7.0/24")
			pod := func(name string, hostPort int) (*lab.Namespace, *libcni.RuntimeConf) {
				ns, err := l.AddNamespace(name)
				if err != nil {
					t.Fatal(err)
				}
				return ns, &libcni.RuntimeConf{
					ContainerID: name, NetNS: ns.Path, IfName: "eth0",
					CapabilityArgs: map[string]any{
						"portMappings": []map[string]any{{"hostPort": hostPort, "containerPort": 80, "protocol": "tcp"}},
						"bandwidth":    map[string]any{"ingressRate": 80_000_000, "ingressBurst": 8_000_000, "egressRate": 80_000_000, "egressBurst": 8_000_000},
					},
				}
			}
			do := func(what string, fn func(*libcni.CNIConfig, *libcni.NetworkConfigList) error) {
				t.Helper()
				if err := n.CNI(fn); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
			}
			ctx := t.Context()
			live, liveConf := pod("live", 8080)
			leaked, leakedConf := pod("leaked", 8081)
			for _, rc := range []*libcni.RuntimeConf{liveConf, leakedConf} {
				do("ADD", func(c *libcni.CNIConfig, list *libcni.NetworkConfigList) error {
					r, err := c.AddNetworkList(ctx, list, rc)
					if err != nil {
						return err
					}
					if list.CNIVersion != "1.1.0" || r.Version() != "1.1.0" {
						return fmt.Errorf("version %s of the list and %s of the result, where cniVersions has 1.1.0", list.CNIVersion, r.Version())
					}
					got, err := types100.GetResult(r)
					if err == nil && len(got.IPs) != 1 {
						err = fmt.Errorf("addresses %v", got.IPs)
					}
					return err
				})
			}
			do("CHECK", func(c *libcni.CNIConfig, list *libcni.NetworkConfigList) error {
				return c.CheckNetworkList(ctx, list, liveConf)
			})
			do("STATUS", func(c *libcni.CNIConfig, list *libcni.NetworkConfigList) error {
				return c.GetStatusNetworkList(ctx, list)
			})
			if got, err := live.Sysctl("net/ipv4/conf/eth0/arp_filter"); err != nil || got != "1" {
				t.Errorf("tuning set arp_filter to %q (%v)", got, err)
			}
			ifbs := func() int {
				out, err := n.Run(ctx, "ip", "-o", "link", "show", "type", "ifb")
				if err != nil {
					t.Fatal(err)
				}
				return strings.Count(string(out), "bwp")
			}
			if ifbs() != 2 {
				t.Errorf("bandwidth made %d devices", ifbs())
			}

			// From outside: the fabric, to the node's address.
			say(t, live, 80, "live")
			say(t, leaked, 80, "leaked")
			for port, want := range map[int]string{8080: "live", 8081: "leaked"} {
				if got, err := hear(l.Fabric, fmt.Sprintf("%s:%d", n.Addrs[0], port)); err != nil || got != want {
					t.Errorf("port %d of the node: %q (%v)", port, got, err)
				}
			}

			// Delete the pod's namespace and all records of it.
			if err := leaked.Delete(); err != nil {
				t.Fatal(err)
			}
			for _, path := range []string{
				filepath.Join(n.StateDir, "culvert", "leaked:eth0"),
				filepath.Join(n.StateDir, "cache", "results", "chain-leaked-eth0"),
			} {
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			}
			if got := held(n, "chain"); !slices.Equal(got, []string{"10.42.7.2", "10.42.7.3"}) || !strings.Contains(rules(t, n), "10.42.7.3:80") {
				t.Fatalf("nothing leaked: %v\n%s", got, rules(t, n))
			}
			time.Sleep(50 * time.Millisecond) // make the records older than the GC
			do("GC", func(c *libcni.CNIConfig, list *libcni.NetworkConfigList) error {
				return c.GCNetworkList(ctx, list, &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: "live", IfName: "eth0"}}})
			})
			if got := held(n, "chain"); !slices.Equal(got, []string{"10.42.7.2"}) {
				t.Errorf("after GC host-local holds %v", got)
			}
			if all := rules(t, n); strings.Contains(all, "10.42.7.3") || strings.Contains(all, "8081") || strings.Contains(all, "leaked") {
				t.Errorf("GC left rules:\n%s", all)
			}
			if ifbs() != 1 {
				t.Errorf("after GC there are %d bandwidth devices", ifbs())
			}
			if got, err := hear(l.Fabric, fmt.Sprintf("%s:8080", n.Addrs[0])); err != nil || got != "live" {
				t.Errorf("after GC the living pod's port: %q (%v)", got, err)
			}
			do("CHECK after GC", func(c *libcni.CNIConfig, list *libcni.NetworkConfigList) error {
				return c.CheckNetworkList(ctx, list, liveConf)
			})
			for range 2 {
				do("DEL", func(c *libcni.CNIConfig, list *libcni.NetworkConfigList) error {
					return c.DelNetworkList(ctx, list, liveConf)
				})
			}
			if all := rules(t, n); len(held(n, "chain")) != 0 || len(kept(n)) != 0 || strings.Contains(all, "10.42.7.2") || ifbs() != 0 {
				t.Errorf("DEL left %v, %v, %d devices\n%s", held(n, "chain"), kept(n), ifbs(), all)
			}
		})
	}
}

// buildTool compiles a program of a module that culvert depends on.
func buildTool(t *testing.T, pkg string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), filepath.Base(pkg))
	cmd := exec.Command("go", "build", "-o", path, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", pkg, err, out)
	}
	return path
}

// writeConflist writes the chain where cnitool reads it.
func writeConflist(t *testing.T, dir string, text []byte) string {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "10-chain.conflist"), text, 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestCnitool runs the same chain with the CNI project's cnitool. It keeps its
// cache in /var/lib/cni, so it runs in a mount namespace.
func TestCnitool(t *testing.T) {
	bin := labtest.Bin(t)
	tool := buildTool(t, "github.com/containernetworking/cni/cnitool")
	l := labtest.New(t, lab.Options{})
	n := l.Nodes[0]
	leaseSubnet(t, n, "10.42.7.0/24")
	text, err := chain(n, "iptables")
	if err != nil {
		t.Fatal(err)
	}
	pod, err := l.AddNamespace("pod")
	if err != nil {
		t.Fatal(err)
	}
	script := `set -e
mount -t tmpfs none /var/lib
held() { ls "$STORE" | grep -c '^10[.]' || true; }
expect() { [ "$(held)" = "$1" ] || { echo "after $2 host-local holds $(held) addresses" >&2; exit 1; }; }
"$TOOL" add chain "$POD" | grep -q 10.42.7.2/24
expect 1 add
"$TOOL" check chain "$POD"
"$TOOL" status chain "$POD"
"$TOOL" gc chain "$POD"   # without a list: libcni deletes what it has cached
expect 0 gc
"$TOOL" add chain "$POD" >/dev/null
expect 1 'the second add'
"$TOOL" del chain "$POD"
"$TOOL" del chain "$POD"
expect 0 del
`
	cmd := exec.Command("unshare", "--mount", "sh", "-c", script)
	cmd.Env = append(os.Environ(),
		"TOOL="+tool, "POD="+pod.Path, "STORE="+filepath.Join(n.StateDir, "networks", "chain"),
		"NETCONFPATH="+writeConflist(t, t.TempDir(), text), "CNI_PATH="+bin+":"+filepath.Join(bin, "cni"),
		`CAP_ARGS={"portMappings":[{"hostPort":8080,"containerPort":80,"protocol":"tcp"}]}`)
	var out []byte
	if err := n.Do(func() (err error) {
		out, err = cmd.CombinedOutput()
		return err
	}); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if all := rules(t, n); strings.Contains(all, "10.42.7") || len(kept(n)) != 0 {
		t.Errorf("cnitool's calls left %v\n%s", kept(n), all)
	}
}

// TestKilledChains kills whole chains at random moments, with a runtime that
// keeps no records, and lets GC clean up.
func TestKilledChains(t *testing.T) {
	bin := labtest.Bin(t)
	tool := buildTool(t, "github.com/containernetworking/cni/cnitool")
	for _, backend := range []string{"iptables", "nftables"} {
		t.Run(backend, func(t *testing.T) {
			l := labtest.New(t, lab.Options{Conflist: func(n *lab.Node) ([]byte, error) { return chain(n, backend) }})
			n := l.Nodes[0]
			leaseSubnet(t, n, "10.42.7.0/24")
			text, err := chain(n, backend)
			if err != nil {
				t.Fatal(err)
			}
			conf := writeConflist(t, t.TempDir(), text)
			add := func(pod *lab.Namespace) *exec.Cmd {
				cmd := exec.Command("unshare", "--mount", "sh", "-c", `mount -t tmpfs none /var/lib && exec "$TOOL" add chain "$POD"`)
				cmd.Env = append(os.Environ(), "TOOL="+tool, "POD="+pod.Path, "NETCONFPATH="+conf, "CNI_PATH="+bin+":"+filepath.Join(bin, "cni"),
					`CAP_ARGS={"portMappings":[{"hostPort":8080,"containerPort":80,"protocol":"tcp"}],"bandwidth":{"ingressRate":80000000,"ingressBurst":8000000,"egressRate":80000000,"egressBurst":8000000}}`)
				cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
				return cmd
			}
			sandbox := func(name string) *lab.Namespace {
				ns, err := l.AddNamespace(name)
				if err != nil {
					t.Fatal(err)
				}
				return ns
			}
			start := time.Now()
			live := sandbox("live")
			cmd := add(live)
			if err := n.Do(cmd.Run); err != nil {
				t.Fatal(err)
			}
			span := time.Since(start)
			records := kept(n)
			id, ifname, _ := strings.Cut(records[0], ":")
			before := uncounted(rules(t, n))

			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d; the chain takes %s", seed, span)
			random := rand.New(rand.NewPCG(seed, 0))
			for k := range 20 {
				cmd := add(sandbox(fmt.Sprintf("k%d", k)))
				if err := n.Do(cmd.Start); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Duration(random.Int64N(int64(span))))
				// Before Wait, the PID still identifies this process group.
				if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
				_ = cmd.Wait() // killed, or just finished
			}
			time.Sleep(50 * time.Millisecond) // make the records older than the GC
			if err := n.CNI(func(c *libcni.CNIConfig, list *libcni.NetworkConfigList) error {
				return c.GCNetworkList(t.Context(), list, &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: id, IfName: ifname}}})
			}); err != nil {
				t.Fatal(err)
			}
			if got := held(n, "chain"); !slices.Equal(got, []string{"10.42.7.2"}) || !slices.Equal(kept(n), records) {
				t.Errorf("after GC host-local holds %v, the plugin remembers %v", got, kept(n))
			}
			if after := uncounted(rules(t, n)); after != before {
				t.Errorf("the rules were\n%s\nand are after GC\n%s", before, after)
			}
			out, err := n.Run(t.Context(), "ip", "-o", "link")
			if links := strings.Count(string(out), "\n"); err != nil || links != 5 { // lo, eth0, cni0, live's veth and ifb
				t.Errorf("after GC the node has (%v)\n%s", err, out)
			}
		})
	}
}

// uncounted removes the counters from a listing of rules.
func uncounted(listing string) string {
	return regexp.MustCompile(`counter packets \d+ bytes \d+`).ReplaceAllString(listing, "counter")
}

// kubeFlannel is the unmodified configuration list of flannel's manifest
// (Documentation/kube-flannel.yml).
const kubeFlannel = `{
  "name": "cbr0",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "flannel",
      "delegate": {
        "hairpinMode": true,
        "isDefaultGateway": true
      }
    },
    {
      "type": "portmap",
      "capabilities": {
        "portMappings": true
      }
    }
  ]
}`

// TestInstalledAsFlannel runs flannel's conflist unchanged, with the plugin
// under flannel's name and at flannel's paths, in a mount namespace.
func TestInstalledAsFlannel(t *testing.T) {
	bin := labtest.Bin(t)
	tool := buildTool(t, "github.com/containernetworking/cni/cnitool")
	l := labtest.New(t, lab.Options{})
	n := l.Nodes[0]
	leaseSubnet(t, n, "10.42.7.0/24")
	pod, err := l.AddNamespace("pod")
	if err != nil {
		t.Fatal(err)
	}
	// /run is hidden below, so the namespace is referenced by a process in it.
	holder, err := pod.Start(lab.Command{Name: "holder", Path: "/bin/sleep", Args: []string{"infinity"}})
	if err != nil {
		t.Fatal(err)
	}
	plugins := t.TempDir()
	if err := os.Symlink(filepath.Join(bin, "culvert-cni"), filepath.Join(plugins, "flannel")); err != nil {
		t.Fatal(err)
	}
	env, err := os.ReadFile(n.SubnetFile())
	if err != nil {
		t.Fatal(err)
	}
	script := `set -e
mount -t tmpfs none /var/lib && mount -t tmpfs none /run
mkdir /run/flannel && printf %s "$SUBNET_ENV" >/run/flannel/subnet.env
"$TOOL" add cbr0 "$POD" | grep -q 10.42.7.2/24
ls /var/lib/cni/flannel | grep -q :eth0
"$TOOL" del cbr0 "$POD"
[ -z "$(ls /var/lib/cni/flannel)" ]
`
	cmd := exec.Command("unshare", "--mount", "sh", "-c", script)
	cmd.Env = append(os.Environ(), "TOOL="+tool, fmt.Sprintf("POD=/proc/%d/ns/net", holder.PID), "SUBNET_ENV="+string(env),
		"NETCONFPATH="+writeConflist(t, t.TempDir(), []byte(kubeFlannel)), "CNI_PATH="+plugins+":"+filepath.Join(bin, "cni"))
	var out []byte
	if err := n.Do(func() (err error) {
		out, err = cmd.CombinedOutput()
		return err
	}); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// TestDelegates uses delegates other than bridge to create the pod's interface.
func TestDelegates(t *testing.T) {
	built := labtest.Bin(t)
	bin := t.TempDir()
	if err := os.Mkdir(filepath.Join(bin, "cni"), 0o755); err != nil {
		t.Fatal(err)
	}
	for target, source := range map[string]string{
		"culvert-cni":    filepath.Join(built, "culvert-cni"),
		"cni/bridge":     filepath.Join(built, "cni", "bridge"),
		"cni/host-local": filepath.Join(built, "cni", "host-local"),
		"cni/static":     filepath.Join(built, "cni", "static"),
		"cni/ptp":        buildTool(t, "github.com/containernetworking/plugins/plugins/main/ptp"),
		"cni/macvlan":    buildTool(t, "github.com/containernetworking/plugins/plugins/main/macvlan"),
	} {
		if err := os.Symlink(source, filepath.Join(bin, target)); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		delegate, ipam map[string]any
		addr           string
		reaches        string // address that the pod must reach; "" for none
	}{
		"ptp":            {map[string]any{"type": "ptp"}, nil, "10.42.7.2", "10.42.7.1"},
		"macvlan":        {map[string]any{"type": "macvlan", "master": "eth0"}, nil, "10.42.7.2", ""},
		"static":         {map[string]any{"type": "macvlan", "master": "eth0"}, map[string]any{"type": "static", "addresses": []any{map[string]string{"address": "198.18.0.201/24"}}}, "198.18.0.201", "198.18.0.254"},
		"bridge by name": {map[string]any{"bridge": "br7"}, nil, "10.42.7.2", "10.42.7.1"},
	} {
		t.Run(name, func(t *testing.T) {
			l := labtest.New(t, lab.Options{Bin: bin, Conflist: func(n *lab.Node) ([]byte, error) {
				ipam := map[string]any{"dataDir": filepath.Join(n.StateDir, "networks")}
				if c.ipam != nil {
					ipam = c.ipam
				}
				return json.Marshal(map[string]any{"name": "net", "cniVersion": "1.1.0", "plugins": []any{map[string]any{
					"type": "culvert-cni", "subnetFile": n.SubnetFile(), "dataDir": filepath.Join(n.StateDir, "culvert"),
					"delegate": c.delegate, "ipam": ipam,
				}}})
			}})
			n := l.Nodes[0]
			leaseSubnet(t, n, "10.42.7.0/24")
			pod, err := n.AddPod(t.Context(), "p1")
			if err != nil {
				t.Fatal(err)
			}
			if got := pod.Addr(true).String(); got != c.addr {
				t.Errorf("the pod has %s, not %s", got, c.addr)
			}
			if c.reaches != "" {
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				if _, err := pod.Ping(ctx, pod.Addr(true), netip.MustParseAddr(c.reaches)); err != nil {
					t.Error(err)
				}
			}
			if err := pod.Check(t.Context()); err != nil {
				t.Errorf("CHECK: %v", err)
			}
			if err := pod.Delete(t.Context()); err != nil {
				t.Error(err)
			}
			if len(held(n, "net")) != 0 || len(kept(n)) != 0 {
				t.Errorf("DEL left %v and %v", held(n, "net"), kept(n))
			}
		})
	}
}
