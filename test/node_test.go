package test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

// TestMasquerade sends from a pod to a machine outside the cluster network, which sees the
// node's address with --ip-masq, and the pod's without.
//
//	pod 10.5.x.2 ── cni0 ── node eth0 198.18.0.1 ── fabric 198.18.0.254
func TestMasquerade(t *testing.T) {
	t.Parallel()
	for _, masq := range []bool{true, false} {
		t.Run(fmt.Sprintf("ip-masq %t", masq), func(t *testing.T) {
			c := newCluster(t, 1)
			c.setConfig(config)
			n := c.Nodes[0]
			c.start(n, fmt.Sprintf("--ip-masq=%t", masq))
			c.waitReady(n, 0)
			pod, err := n.AddPod(t.Context(), "p1")
			if err != nil {
				t.Fatal(err)
			}
			want := n.Addrs[0]
			if !masq {
				want = pod.Addr(true)
			}
			server, err := c.Fabric.ListenPacket(t.Context(), "udp", netip.AddrPortFrom(c.FabricAddrs[0], 9999).String())
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			client, err := pod.Dial(t.Context(), "udp", server.LocalAddr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			if _, err := client.Write([]byte("who am I?")); err != nil {
				t.Fatal(err)
			}
			if err := server.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
				t.Fatal(err)
			}
			_, from, err := server.ReadFrom(make([]byte, 100))
			if err != nil {
				t.Fatal(err)
			}
			if got := from.(*net.UDPAddr).AddrPort().Addr(); got != want {
				t.Errorf("the machine outside saw %s, want %s", got, want)
			}
		})
	}
}

// TestUnleasedAddressesStayInside sends packets to an address of the cluster network that
// no node leases: they do not take the default route, neither while the daemon runs nor
// after it has stopped.
func TestUnleasedAddressesStayInside(t *testing.T) {
	c := newCluster(t, 1)
	c.setConfig(config)
	n := c.Nodes[0]
	p := c.start(n)
	c.waitReady(n, 0)
	outside, err := c.Fabric.ListenPacket(t.Context(), "ip4:icmp", "0.0.0.0")
	if err != nil {
		t.Fatal(err)
	}
	defer outside.Close()
	nobody := netip.MustParseAddr("10.5.222.2")
	ping := func() {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		if _, err := n.Ping(ctx, netip.Addr{}, nobody); err == nil {
			t.Fatalf("%s answered, although no node leases it", nobody)
		}
	}
	ping()
	c.wait(n, "counts the drop", func(s api.Status) bool {
		for _, d := range s.Datapath.Drops {
			if d.Reason == "egress-no-peer" {
				return true
			}
		}
		return false
	})
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	ping()
	if err := outside.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, from, err := outside.ReadFrom(make([]byte, 1500)); err == nil {
		t.Errorf("a packet from %s left by the default route", from)
	}
}

// TestProbes fetches a node's /livez, /readyz and /metrics, before and after it has a
// network configuration.
func TestProbes(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	n := c.Nodes[0]
	c.start(n)
	get := func(path string) (int, string) { return c.get(n, path) }
	if code, text := get("/livez"); code != http.StatusOK {
		t.Errorf("/livez: %d %s", code, text)
	}
	if code, text := get("/readyz"); code != http.StatusServiceUnavailable || strings.TrimSpace(text) == "" {
		t.Errorf("/readyz without a network configuration: %d %q", code, text)
	}
	c.setConfig(config)
	c.waitReady(n, 0)
	if code, text := get("/readyz"); code != http.StatusOK {
		t.Errorf("/readyz: %d %s", code, text)
	}
	c.wait(n, "counts its own lease", func(s api.Status) bool { return len(s.Usage) == 1 && s.Usage[0].Used == 1 })
	_, text := get("/metrics")
	for _, line := range []string{
		"culvert_ready 1", "culvert_store_connected 1", "culvert_peers 0", "culvert_fenced 0", `culvert_subnets_used{network="10.5.0.0/16"} 1`, `culvert_subnets_capacity{network="10.5.0.0/16"} 255`, `culvert_packets_total{direction="egress"}`,
		`datapath="userspace"`, `wire_format="vxlan"`,
	} {
		if !strings.Contains(text, line) {
			t.Errorf("/metrics lacks %s", line)
		}
	}
}

// TestEmbeddedEtcd has two machines, the first with --embedded-etcd. If the etcd process is
// killed, the daemon starts it again; if the daemon is killed, etcd ends too, and the next
// daemon does not wait for it before it is ready.
func TestEmbeddedEtcd(t *testing.T) {
	t.Parallel()
	labtest.NeedTUN(t)
	bin := labtest.Bin(t)
	l := labtest.New(t, lab.Options{Nodes: 2})
	c := &cluster{Lab: l, t: t, bin: bin}
	listen := netip.AddrPortFrom(l.Nodes[0].Addrs[0], 2379).String()
	c.endpoint = "http://" + listen
	flags := []string{"--datapath", "userspace", "--embedded-etcd", "--etcd-listen", listen, "--etcd-data-dir", filepath.Join(l.Dir, "embedded")}
	startFirst := func() *lab.Process { return c.start(l.Nodes[0], flags...) }
	first := startFirst()
	c.wait(l.Nodes[0], "waits for a configuration", func(s api.Status) bool { return strings.Contains(s.NotReady, "culvert config set") })
	c.start(l.Nodes[1])
	c.setConfig(config)
	for _, n := range l.Nodes {
		c.waitReady(n, 1)
	}
	server := childOf(t, first.PID, "culvert-etcd")
	if err := kill(server); err != nil {
		t.Fatal(err)
	}
	eventually(t, "etcd is started again", func() error {
		if again := findChild(first.PID, "culvert-etcd"); again == 0 || again == server {
			return fmt.Errorf("the server has the PID %d", again)
		}
		return nil
	})
	c.put("/coreos.com/network/subnets/10.5.99.0-24", "{")
	c.wait(l.Nodes[1], "gets changes from etcd again", func(s api.Status) bool { return len(s.Rejected) == 1 && len(s.Peers) == 1 && s.Ready })

	// After a handover the successor runs its own etcd.
	server = childOf(t, first.PID, "culvert-etcd")
	first, _ = c.replace(l.Nodes[0], first, flags...)
	if alive(server) {
		t.Error("the old daemon's etcd is still running")
	}
	eventually(t, "the successor runs etcd", func() error {
		if findChild(first.PID, "culvert-etcd") == 0 {
			return errors.New("it has no child culvert-etcd")
		}
		return nil
	})
	c.put("/coreos.com/network/subnets/10.5.98.0-24", "{")
	c.wait(l.Nodes[1], "gets changes from the successor's etcd", func(s api.Status) bool { return len(s.Rejected) == 2 && len(s.Peers) == 1 && s.Ready })

	// A restarted daemon is ready from its snapshot, without waiting for its etcd.
	pods := c.pods()
	ping(t, pods[0], pods[1])
	c.waitKept(l.Nodes[0], 2)
	pings := startPings(t, pods[0], pods[1])
	if err := first.Kill(); err != nil {
		t.Fatal(err)
	}
	first = startFirst()
	c.wait(l.Nodes[0], "is ready again", func(s api.Status) bool { return s.Ready && s.Store.Connected && len(s.Peers) == 1 })
	sent, lost := pings.stop()
	t.Logf("of %d pings %d lost, longest gap %s", sent, lost, pings.gap())
	if log := first.Tail(50); !strings.Contains(log, "serving from the snapshot on disk") {
		t.Errorf("the daemon waited for its own etcd:\n%s", log)
	}

	server = childOf(t, first.PID, "culvert-etcd")
	if err := first.Kill(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "etcd ends with its daemon", func() error {
		if alive(server) {
			return fmt.Errorf("process %d is still running", server)
		}
		return nil
	})
}

// TestRefusals starts daemons that must exit with an error, and checks the reason.
func TestRefusals(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	ends := func(p *lab.Process, say string) {
		t.Helper()
		select {
		case <-p.Exited():
		case <-time.After(20 * time.Second):
			t.Fatalf("the daemon keeps running; it must exit with %q", say)
		}
		if log := p.Tail(20); p.Err() == nil || !strings.Contains(log, say) {
			t.Errorf("the daemon exited with %v and printed\n%s\nwant %q", p.Err(), log, say)
		}
	}
	ends(c.start(c.Nodes[0], "--iface", "nonsense7"), "interfaces here: eth0")
	c.setConfig(`{"Network":"198.18.0.0/16","Backend":{"Type":"vxlan"}}`)
	ends(c.start(c.Nodes[0]), "198.18.0.0/24")
	c.setConfig(config)
	c.start(c.Nodes[0])
	c.waitReady(c.Nodes[0], 0)
	ends(c.start(c.Nodes[0]), "runs in this network namespace")
	// A cloned machine has the same node ID at another address.
	c.starts++
	clone, err := c.Nodes[1].Start(lab.Command{
		Name: "clone", Path: filepath.Join(c.bin, "culvert"),
		Args: []string{"run", "--node-id", c.Nodes[0].ID, "--run-dir", c.Nodes[1].RunDir, "--etcd-endpoints", c.endpoint},
	})
	if err != nil {
		t.Fatal(err)
	}
	ends(clone, c.Nodes[0].Addrs[0].String())
	c.waitReady(c.Nodes[0], 0)
}
