package ipip_test

import (
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"culvert/backend"
	"culvert/backend/ipip"
	"culvert/internal/firewall"
	"culvert/internal/host"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
	"culvert/subnet"
)

var update = flag.Bool("update", false, "rewrite the golden file")

func TestMain(m *testing.M) { labtest.Main(m) }

func lease(k int) subnet.Lease {
	return subnet.Lease{Node: fmt.Sprintf("n%d", k), Backend: "ipip", Endpoints: []subnet.Endpoint{{
		Subnet: netip.MustParsePrefix(fmt.Sprintf("10.5.%d.0/24", k)), Public: netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", k)),
	}}}
}

func snapshot(t *testing.T, options string, peers ...subnet.Lease) subnet.Snapshot {
	t.Helper()
	c, _, err := subnet.ParseConfig([]byte(`{"Network":"10.5.0.0/16","Backend":{"Type":"ipip"` + options + `}}`))
	if err != nil {
		t.Fatal(err)
	}
	return subnet.Snapshot{Config: c, Self: lease(1), Peers: peers}
}

func plan(t *testing.T, s subnet.Snapshot) host.State {
	t.Helper()
	u := host.Underlay{Name: "eth0", MTU: 1500, Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, Networks: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")}}
	w, err := ipip.Plan(backend.Node{Underlay: u, IPMasq: true}, s, host.View{Underlay: u})
	if err != nil {
		t.Fatal(err)
	}
	return w.State
}

// TestCommands compares the changes of a sequence of snapshots, as shell commands,
// with the golden file.
func TestCommands(t *testing.T) {
	moved := lease(2)
	moved.Endpoints[0].Public = netip.MustParseAddr("192.0.2.22")
	var b strings.Builder
	var before host.State
	for _, step := range []struct {
		name string
		s    subnet.Snapshot
	}{
		{"alone", snapshot(t, "")},
		{"two peers join", snapshot(t, "", lease(2), lease(3))},
		{"one changes its underlay address", snapshot(t, "", moved, lease(3))},
		{"one leaves", snapshot(t, "", lease(3))},
		{"a smaller MTU", snapshot(t, `,"MTU":1400`, lease(3))},
	} {
		after := plan(t, step.s)
		fmt.Fprintf(&b, "# %s\n%s\n\n", step.name, strings.Join(host.Transition(before, after), "\n"))
		before = after
	}
	fmt.Fprintf(&b, "# cleanup\n%s\n", strings.Join(host.Transition(before, host.State{}), "\n"))
	if *update {
		if err := os.WriteFile("testdata/commands.golden", []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	golden, err := os.ReadFile("testdata/commands.golden")
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(golden) {
		t.Errorf("the commands are\n%s\nwant\n%s", b.String(), golden)
	}
}

// TestKernel applies the sequence to the running kernel if that supports ipip
// devices. Many do not; `make test-vm` boots one that does.
func TestKernel(t *testing.T) {
	n := labtest.New(t, lab.Options{Nodes: 1, Prefixes: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}).Nodes[0]
	if err := n.Do(func() error { return host.Supports("ipip") }); err != nil {
		if os.Getenv("CULVERT_VM") != "" {
			t.Fatal(err)
		}
		t.Skipf("NOT TESTED HERE: %v; make test-vm tests it", err)
	}
	var before host.State
	for _, s := range []subnet.Snapshot{snapshot(t, ""), snapshot(t, "", lease(2), lease(3)), snapshot(t, `,"MTU":1400`, lease(3))} {
		after := plan(t, s)
		for _, want := range []int{len(host.Transition(before, after)), 0} {
			var done []host.Change
			if err := n.Do(func() (err error) { done, err = host.Apply(after); return err }); err != nil {
				t.Fatal(err)
			}
			if len(done) > want {
				t.Errorf("%d changes, want at most %d: %q", len(done), want, host.Commands(done))
			}
		}
		before = after
	}
}

// TestGuard sends IPIP packets to a node that has the firewall rules and no ipip
// device, which the rules do not need. Packets of a peer pass; packets with an
// inner source outside the peer's subnet, and packets from a stranger, are dropped
// and counted; packets to destinations outside the cluster network are ignored.
func TestGuard(t *testing.T) {
	l := labtest.New(t, lab.Options{Nodes: 3, Prefixes: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}})
	n := l.Nodes[0]
	state := plan(t, snapshot(t, "", lease(2)))
	rules := host.State{Firewall: state.Firewall}
	if err := n.Do(func() error { _, err := host.Apply(rules); return err }); err != nil {
		t.Fatal(err)
	}
	send := func(from *lab.Node, source, destination string) {
		t.Helper()
		c, err := from.ListenPacket(t.Context(), "ip4:4", from.Addrs[0].String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		inner := make([]byte, 28) // IPv4 header (RFC 791); the payload does not matter
		inner[0], inner[3], inner[8], inner[9] = 0x45, byte(len(inner)), 64, 17
		copy(inner[12:], netip.MustParseAddr(source).AsSlice())
		copy(inner[16:], netip.MustParseAddr(destination).AsSlice())
		if _, err := c.WriteTo(inner, &net.IPAddr{IP: n.Addrs[0].AsSlice()}); err != nil {
			t.Fatal(err)
		}
	}
	dropped := func() (count uint64) {
		if err := n.Do(func() error {
			drops := firewall.Drops(rules.Firewall)
			count = drops["ingress-source"] + 10*drops["ingress-stranger"]
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return count
	}
	for _, c := range []struct {
		name                string
		from                *lab.Node
		source, destination string
		dropped             uint64 // total so far; a stranger's packet counts as ten
	}{
		{"from a peer", l.Nodes[1], "10.5.2.7", "10.5.1.7", 0},
		{"from a peer with another node's inner source", l.Nodes[1], "10.5.3.7", "10.5.1.7", 1},
		{"from a peer with an inner source in this node's subnet", l.Nodes[1], "10.5.1.9", "10.5.1.7", 2},
		{"from a stranger", l.Nodes[2], "10.5.2.7", "10.5.1.7", 12},
		{"outside the cluster network", l.Nodes[2], "172.16.0.1", "172.16.0.2", 12},
	} {
		send(c.from, c.source, c.destination)
		// The link has no delay: 50 ms after the expected count, any other
		// packet would have been counted too.
		deadline := time.Now().Add(5 * time.Second)
		for dropped() < c.dropped && time.Now().Before(deadline) {
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(50 * time.Millisecond)
		if got := dropped(); got != c.dropped {
			t.Errorf("%s: %d dropped, want %d", c.name, got, c.dropped)
		}
	}
}
