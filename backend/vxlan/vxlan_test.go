package vxlan_test

import (
	"context"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"culvert/backend"
	"culvert/backend/vxlan"
	"culvert/internal/host"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
	"culvert/subnet"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestMain(m *testing.M) { labtest.Main(m) }

var (
	underlay4 = netip.MustParsePrefix("192.0.2.0/24")
	underlay6 = netip.MustParsePrefix("2001:db8:1::/64")
)

// config returns a dual-stack network configuration.
func config(t testing.TB, options string) subnet.Config {
	t.Helper()
	c, _, err := subnet.ParseConfig([]byte(`{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","IPv6SubnetLen":64,
		"Backend":{"Type":"vxlan"` + options + `}}`))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// lease returns the k-th node's lease: 10.5.k.0/24 and fd00:5:0:k::/64 at 192.0.2.k
// and 2001:db8:1::k.
func lease(k int) subnet.Lease {
	name := fmt.Sprintf("n%d", k)
	return subnet.Lease{Node: name, Backend: "vxlan", Endpoints: []subnet.Endpoint{
		{
			Subnet: netip.MustParsePrefix(fmt.Sprintf("10.5.%d.0/24", k)), Public: netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", k)),
			VTEP: subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC(name, 1, false)},
		},
		{
			Subnet: netip.MustParsePrefix(fmt.Sprintf("fd00:5:0:%x::/64", k)), Public: netip.MustParseAddr(fmt.Sprintf("2001:db8:1::%x", k)),
			VTEP: subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC(name, 1, true)},
		},
	}}
}

func node() backend.Node {
	return backend.Node{IPMasq: true, Underlay: host.Underlay{
		Name: "eth0", Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8:1::1")},
	}}
}

func view() host.View {
	u := node().Underlay
	u.MTU = 1500
	u.Networks = []netip.Prefix{netip.PrefixFrom(u.Addrs[0], 24), netip.PrefixFrom(u.Addrs[1], 64)}
	return host.View{Underlay: u}
}

// sequence returns the snapshots that a node sees: it starts alone, peers join,
// change and leave.
func sequence(t testing.TB) (names []string, snapshots []subnet.Snapshot) {
	add := func(name string, c subnet.Config, peers ...subnet.Lease) {
		names = append(names, name)
		snapshots = append(snapshots, subnet.Snapshot{Config: c, Self: lease(1), Peers: peers})
	}
	c := config(t, "")
	moved, renamed := lease(2), lease(3)
	moved.Endpoints[0].Public = netip.MustParseAddr("192.0.2.22")
	renamed.Endpoints[0].VTEP.MAC = subnet.MAC{2, 0, 0, 0, 0, 3}
	add("alone", c)
	add("two peers join", c, lease(2), lease(3))
	add("one changes its underlay address, the other its VTEP MAC", c, moved, renamed)
	add("one leaves", c, renamed)
	add("other options", config(t, `,"GBP":true,"Port":4789`), renamed)
	c = config(t, `,"GBP":true,"Port":4789,"MTU":1400`)
	add("a smaller MTU", c, renamed)
	wide := lease(4)
	wide.Endpoints[0].Subnet = netip.MustParsePrefix("10.5.4.0/23")
	wide.Endpoints[1].Subnet = netip.MustParsePrefix("fd00:5:0:10::/60")
	add("replaced by a peer with larger subnets", c, wide)
	add("the first peer is back", c, renamed, wide)
	return names, snapshots
}

func plan(t testing.TB, s subnet.Snapshot) host.State {
	t.Helper()
	w, err := vxlan.Plan(node(), s, view())
	if err != nil {
		t.Fatal(err)
	}
	return w.State
}

// TestCommands compares the changes of each step of the sequence, as shell
// commands, with the golden file.
func TestCommands(t *testing.T) {
	names, snapshots := sequence(t)
	var b strings.Builder
	var before host.State
	for i, s := range snapshots {
		after := plan(t, s)
		fmt.Fprintf(&b, "# %s\n%s\n\n", names[i], strings.Join(host.Transition(before, after), "\n"))
		if again := host.Transition(after, plan(t, s)); len(again) > 0 {
			t.Errorf("%s, a second time: %q", names[i], again)
		}
		before = after
	}
	fmt.Fprintf(&b, "# cleanup\n%s\n", strings.Join(host.Transition(before, host.State{}), "\n"))
	const file = "testdata/commands.golden"
	if *update {
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	golden, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(golden) {
		t.Errorf("the commands are\n%s\nwant\n%s", b.String(), golden)
	}
}

func newNode(t testing.TB) *lab.Node {
	return labtest.New(t, lab.Options{Nodes: 1, Prefixes: []netip.Prefix{underlay4, underlay6}}).Nodes[0]
}

func apply(t testing.TB, n *lab.Node, s host.State) []string {
	t.Helper()
	var done []host.Change
	err := n.Do(func() (err error) {
		done, err = host.Apply(s)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return host.Commands(done)
}

// TestKernelMatchesPlan applies the sequence to the running kernel: the changes made
// are those that the plans alone predict, and applying a step again changes nothing.
func TestKernelMatchesPlan(t *testing.T) {
	n := newNode(t)
	names, snapshots := sequence(t)
	var before host.State
	for i, s := range append(snapshots, subnet.Snapshot{}) {
		name, after := "cleanup", host.State{}
		if i < len(snapshots) {
			name, after = names[i], plan(t, s)
		}
		got := apply(t, n, after)
		if want := host.Transition(before, after); !equal(got, want) {
			t.Errorf("%s: done\n%s\npredicted\n%s", name, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		if again := apply(t, n, after); len(again) > 0 {
			t.Errorf("%s, a second time: %q", name, again)
		}
		before = after
	}
}

// equal compares commands without sysctl and nft: a new device may already have
// the settings.
func equal(a, b []string) bool {
	return strings.Join(lasting(a), "\n") == strings.Join(lasting(b), "\n")
}

func lasting(commands []string) []string {
	var all []string
	for _, c := range commands {
		if !strings.HasPrefix(c, "sysctl ") && !strings.HasPrefix(c, "nft ") {
			all = append(all, c)
		}
	}
	return all
}

// TestCommandsGiveTheSameState runs the commands with ip, bridge and nft in one namespace,
// applies the same states with culvert in another, and compares what those programs
// show. At the end it saves and restores the nftables table with nft, after which
// culvert has nothing to change.
func TestCommandsGiveTheSameState(t *testing.T) {
	for _, program := range []string{"ip", "bridge", "nft", "sysctl"} {
		if _, err := exec.LookPath(program); err != nil {
			if os.Getenv("CULVERT_FULL") != "" {
				t.Fatal(err)
			}
			t.Skip("needs iproute2, nftables and procps: make test-system installs them, and runs this test")
		}
	}
	byHand, byCulvert := newNode(t), newNode(t)
	names, snapshots := sequence(t)
	var before host.State
	for i, s := range snapshots {
		after := plan(t, s)
		apply(t, byCulvert, after)
		for _, command := range host.Transition(before, after) {
			if out, err := run(t, byHand, command); err != nil {
				t.Fatalf("%s: %s: %v: %s", names[i], command, err, out)
			}
		}
		for _, show := range []string{
			"ip -d link show type vxlan", "ip -4 addr show dev cvt.1", "ip -6 addr show dev cvt6.1", "ip -4 route show proto 67", "ip -6 route show proto 67",
			"ip neigh show nud permanent dev cvt.1", "ip -6 neigh show nud permanent dev cvt6.1", "bridge fdb show dev cvt.1", "bridge fdb show dev cvt6.1",
			"nft list table inet culvert",
		} {
			want, err1 := run(t, byHand, show)
			got, err2 := run(t, byCulvert, show)
			if err1 != nil || err2 != nil || canonical(got) != canonical(want) {
				t.Errorf("%s: %s shows\n%s\nwith culvert, and\n%s\nwith the commands (%v, %v)", names[i], show, canonical(got), canonical(want), err1, err2)
			}
		}
		before = after
	}

	saved, err := run(t, byCulvert, "nft list table inet culvert")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "saved.nft")
	if err := os.WriteFile(file, []byte("delete table inet culvert\n"+saved), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := run(t, byCulvert, "nft -f "+file); err != nil {
		t.Fatalf("nft cannot read its own output: %v: %s\n%s", err, out, saved)
	}
	if changes := apply(t, byCulvert, before); len(changes) > 0 {
		t.Errorf("after saving and restoring the table culvert changed %q", changes)
	}
}

func run(t *testing.T, n *lab.Node, command string) (string, error) {
	words := strings.Fields(command)
	if words[0] == "nft" && words[1] != "-f" { // nft parses the rest itself: pass one argument
		words = []string{"nft", strings.TrimPrefix(command, "nft ")}
	}
	out, err := n.Run(context.WithoutCancel(t.Context()), words[0], words[1:]...)
	return string(out), err
}

// canonical removes what differs between namespaces: interface indexes, rule
// comments and the order of lines.
func canonical(shown string) string {
	var lines []string
	for line := range strings.Lines(shown) {
		if i := strings.Index(line, " comment \""); i >= 0 {
			line = line[:i]
		}
		if _, rest, found := strings.Cut(line, ": cvt"); found {
			line = "cvt" + rest
		}
		lines = append(lines, strings.TrimSpace(line))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}
