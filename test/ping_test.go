package test

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/lab"
)

// TestPing runs `culvert ping` from a userspace node and a kernel node to a kernel node, a
// handmade node as of flannel, and a pod; then with each fault that it distinguishes. It
// also checks what `culvert doctor` finds.
func TestPing(t *testing.T) {
	c := newClusterOf(t, lab.Options{Nodes: 3, Prefixes: dualUnderlay})
	c.setConfig(dual)
	n1, n2 := c.Nodes[0], c.Nodes[1]
	c.start(n1, "--datapath", "userspace")
	n2Daemon := c.start(n2, "--datapath", "kernel")
	self := c.waitReady(n1, 1)
	c.introduce(c.addHandmade(c.Nodes[2], "10.5.250.0/24", "fd00:5:0:fa::/64"), n1, self)
	c.waitReady(n1, 2)
	c.waitReady(n2, 2)
	pod, err := n2.AddPod(t.Context(), "p1")
	if err != nil {
		t.Fatal(err)
	}

	type result struct {
		Node     string     `json:"node"`
		Address  netip.Addr `json:"address"`
		Sent     int        `json:"sent"`
		Answered int        `json:"answered"`
		MTU      int        `json:"mtu"`
		Problem  string     `json:"problem"`
	}
	ping := func(from *lab.Node, args ...string) ([]result, error) {
		t.Helper()
		args = append([]string{"ping", "--run-dir", from.RunDir, "-i", "10ms", "--timeout", "300ms", "-o", "json"}, args...)
		out, err := from.Run(t.Context(), filepath.Join(c.bin, "culvert"), args...)
		var results []result
		if len(bytes.TrimSpace(out)) > 0 {
			if err := json.Unmarshal(out, &results); err != nil {
				t.Fatalf("%s\n%v", out, err)
			}
		}
		return results, err
	}
	well := func(r result) bool { return r.Answered == 3 && r.Problem == "" && r.MTU == self.Datapath.MTU }

	if got, err := ping(n1, "--all"); err != nil || len(got) != 4 || !slices.ContainsFunc(got, well) || slices.ContainsFunc(got, func(r result) bool { return !well(r) }) {
		t.Errorf("n1 pings all: %+v, %v", got, err)
	}
	// n3 has only n1 as a peer, so n2 does not ping it.
	if got, err := ping(n2, "n1"); err != nil || len(got) != 2 || slices.ContainsFunc(got, func(r result) bool { return !well(r) || r.Node != "n1" }) {
		t.Errorf("n2 pings n1: %+v, %v", got, err)
	}
	if got, err := ping(n1, pod.Addrs[0].String(), pod.Addrs[1].String()); err != nil || len(got) != 2 || slices.ContainsFunc(got, func(r result) bool { return !well(r) }) {
		t.Errorf("n1 pings a pod: %+v, %v", got, err)
	}
	for arg, want := range map[string]string{
		"n9": "no node has the name", "10.5.249.1": "no node leases", "192.0.2.1": "not in the cluster network", "n1": "this node",
	} {
		if _, err := ping(n1, arg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ping %s: %v", arg, err)
		}
	}

	// doctor returns the checks of the bad findings of `culvert doctor`.
	doctor := func(on *lab.Node) (found []string) {
		t.Helper()
		out, err := on.Run(t.Context(), filepath.Join(c.bin, "culvert"), "doctor", "--run-dir", on.RunDir, "--no-cni", "-o", "json")
		var results []struct {
			Findings []struct{ Severity, Check, Text, Fix string }
		}
		if err := json.Unmarshal(out, &results); err != nil {
			t.Fatalf("%s\n%v", out, err)
		}
		for _, r := range results {
			for _, f := range r.Findings {
				if f.Severity == "bad" {
					found = append(found, f.Check)
				}
			}
		}
		if (err != nil) != (len(found) > 0) {
			t.Errorf("doctor found %v and exited with %v", found, err)
		}
		return found
	}
	if found := doctor(n1); len(found) > 0 {
		t.Errorf("doctor on a healthy node: %v", found)
	}

	// A link on the path silently drops packets that the nodes' own links allow.
	setMTU := func(mtu int) {
		t.Helper()
		if err := c.Fabric.Do(func() error {
			link, err := netlink.LinkByName(n2.ID)
			if err != nil {
				return err
			}
			return netlink.LinkSetMTU(link, mtu)
		}); err != nil {
			t.Fatal(err)
		}
	}
	setMTU(1400)
	n2Address := c.waitReady(n2, 2).Lease.Subnets[0].Addr()
	got, err := ping(n1, n2.Addrs[0].String())
	if err == nil || len(got) != 2 || got[0].Answered != 3 || got[0].MTU >= self.Datapath.MTU || got[0].MTU < 1250 || !strings.Contains(got[0].Problem, "do not pass") {
		t.Errorf("over a narrow link: %+v, %v", got, err)
	}
	if found := doctor(n1); !slices.Equal(found, []string{"path-mtu", "path-mtu"}) { // one per family
		t.Errorf("doctor over a narrow link: %v", found)
	}
	setMTU(1500)

	// The peer's tunnel is removed.
	if err := n2Daemon.Stop(); err != nil {
		t.Fatal(err)
	}
	c.cleanup(n2)
	got, err = ping(n1, n2Address.String())
	if err == nil || len(got) != 1 || got[0].Answered != 0 || !strings.Contains(got[0].Problem, "answers on the underlay") {
		t.Errorf("ping to a node without its tunnel: %+v, %v", got, err)
	}
	if found := doctor(n1); !slices.Equal(found, []string{"peer-unreachable", "peer-unreachable"}) {
		t.Errorf("doctor with a peer without its tunnel: %v", found)
	}
	if found := doctor(n2); !slices.Contains(found, "daemon") {
		t.Errorf("doctor without a daemon: %v", found)
	}
	// The peer is down.
	if err := n2.Do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkSetDown(link)
	}); err != nil {
		t.Fatal(err)
	}
	got, err = ping(n1, n2Address.String())
	if err == nil || len(got) != 1 || !strings.Contains(got[0].Problem, "the node is down") {
		t.Errorf("ping to a node that is down: %+v, %v", got, err)
	}
}

// TestPingOneDirection drops the tunnel's packets in one direction, and checks which one
// `culvert ping` names on either side:
//
//	n1: userspace ── fabric: drops what comes from one of them ── n2: kernel
func TestPingOneDirection(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.setConfig(`{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}`)
	c.start(c.Nodes[0], "--datapath", "userspace", "--probe-interval", "1s")
	c.start(c.Nodes[1], "--datapath", "kernel", "--probe-interval", "1s")
	for _, n := range c.Nodes {
		c.waitReady(n, 1)
	}
	for i, sender := range c.Nodes {
		receiver := c.Nodes[1-i]
		t.Run("from "+sender.ID, func(t *testing.T) {
			c.eat(c.Fabric, sender.ID, true)
			// The receiver's packets reach the sender, but no answer reaches the receiver.
			awaitPing(t, c, sender, receiver, "there", "through the tunnel")
			awaitPing(t, c, receiver, sender, "unknown", "they are lost on the way here")
			c.eat(c.Fabric, sender.ID, false)
			awaitPing(t, c, sender, receiver, "", "")
		})
	}
}

// awaitPing waits until `culvert ping` says that what is lost of from's packets to a node is
// lost and why.
func awaitPing(t *testing.T, c *cluster, from, to *lab.Node, lost, why string) {
	t.Helper()
	var text string
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		out, err := from.Run(t.Context(), filepath.Join(c.bin, "culvert"), "ping", "--run-dir", from.RunDir, "-i", "10ms", "--timeout", "300ms", "-o", "json", to.ID)
		text = string(out)
		var got []struct{ Lost, Problem string }
		if json.Unmarshal(out, &got) == nil && len(got) == 1 && (err == nil) == (lost == "") && got[0].Lost == lost && strings.Contains(got[0].Problem, why) {
			return
		}
	}
	t.Fatalf("%s pings %s: lost is not %q, or why is not %q: %s", from.ID, to.ID, lost, why, text)
}

// eat drops VXLAN packets that arrive by a link of a namespace, or no longer.
func (c *cluster) eat(at *lab.Namespace, link string, drop bool) {
	c.t.Helper()
	if err := at.Do(eaten(link, drop)); err != nil {
		c.t.Fatal(err)
	}
}

// eaten drops VXLAN packets that arrive by a link of the namespace it runs in, or no longer.
func eaten(link string, drop bool) func() error {
	return func() error {
		x, err := nftables.New()
		if err != nil {
			return err
		}
		table := x.AddTable(&nftables.Table{Family: nftables.TableFamilyNetdev, Name: "moat"})
		if !drop {
			x.DelTable(table)
			return x.Flush()
		}
		ch := x.AddChain(&nftables.Chain{
			Name: "bridge", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookIngress, Device: link,
			Priority: nftables.ChainPriorityFilter,
		})
		x.AddRule(&nftables.Rule{Table: table, Chain: ch, Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(8472)},
			&expr.Verdict{Kind: expr.VerdictDrop},
		}})
		return x.Flush()
	}
}
