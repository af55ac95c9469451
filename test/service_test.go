package test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"culvert/internal/lab"
)

// serviceRules are the rules that kube-proxy in iptables mode writes for a service with one
// endpoint: ClusterIP 10.96.0.10:80 over TCP and UDP, and NodePort 30080.
const serviceRules = `*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SVC-1 - [0:0]
:KUBE-EXT-1 - [0:0]
:KUBE-SEP-1 - [0:0]
:KUBE-SVC-2 - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-1
-A KUBE-SERVICES -d 10.96.0.10/32 -p udp -m udp --dport 80 -j KUBE-SVC-2
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-EXT-1
-A KUBE-EXT-1 -m comment --comment "masquerade traffic for external destinations" -j KUBE-MARK-MASQ
-A KUBE-EXT-1 -j KUBE-SVC-1
-A KUBE-SVC-1 ! -s 10.5.0.0/16 -d 10.96.0.10/32 -p tcp -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-1 -j KUBE-SEP-1
-A KUBE-SEP-1 -s POD/32 -j KUBE-MARK-MASQ
-A KUBE-SEP-1 -p tcp -m tcp -j DNAT --to-destination POD:8080
-A KUBE-SVC-2 ! -s 10.5.0.0/16 -d 10.96.0.10/32 -p udp -m udp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-2 -p udp -m udp -j DNAT --to-destination POD:8080
COMMIT
`

// TestServices reaches a service through each datapath, with kube-proxy's rules:
//
//	pod1 on n1, n1 itself ── ClusterIP ──┐
//	outside ── NodePort of n1 ───────────┼── n1 ── underlay ── n2 ── pod2, the endpoint
//	pod2 ── ClusterIP, to itself ────────┘                            (on n2)
func TestServices(t *testing.T) {
	if _, err := exec.LookPath("iptables-nft-restore"); err != nil {
		if os.Getenv("CULVERT_FULL") != "" {
			t.Fatal(err)
		}
		t.Skip("needs iptables: make test-system installs it and runs this test")
	}
	for name, flags := range map[string][]string{
		"kernel": {"--datapath", "kernel", "--fast-path", "off"}, "fast path": {"--datapath", "kernel", "--fast-path", "on"}, "userspace": {"--datapath", "userspace"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t, 2)
			c.setConfig(config)
			var subnets []netip.Prefix
			for _, n := range c.Nodes {
				c.start(n, flags...)
			}
			for _, n := range c.Nodes {
				subnets = append(subnets, c.waitReady(n, 1).Lease.Subnets[0])
			}
			pods := c.pods()
			endpoint := pods[1].Addr(true)
			for _, n := range c.Nodes {
				restoreServices(t, n, endpoint)
			}
			serve(t, pods[1])
			const clusterIP, udp = "10.96.0.10:80", "udp"
			for _, u := range []struct {
				name        string
				from        *lab.Namespace
				network, to string
				seenAs      netip.Addr // by the endpoint
			}{
				{"from a pod to the ClusterIP", pods[0].Namespace, "tcp", clusterIP, pods[0].Addr(true)},
				{"from a pod to the ClusterIP", pods[0].Namespace, udp, clusterIP, pods[0].Addr(true)},
				{"from the node to the ClusterIP", c.Nodes[0].Namespace, "tcp", clusterIP, subnets[0].Addr()},
				{"from outside to the NodePort", c.Fabric, "tcp", netip.AddrPortFrom(c.Nodes[0].Addrs[0], 30080).String(), subnets[0].Addr()},
				{"from the endpoint itself to the ClusterIP (hairpin)", pods[1].Namespace, "tcp", clusterIP, subnets[1].Addr().Next()},
			} {
				seen, err := useService(t.Context(), u.from, u.network, u.to)
				if err != nil {
					t.Errorf("%s, %s: %v", u.name, u.network, err)
				} else if seen != u.seenAs {
					t.Errorf("%s, %s: the endpoint saw %s, want %s", u.name, u.network, seen, u.seenAs)
				}
			}
		})
	}
}

func restoreServices(t *testing.T, n *lab.Node, endpoint netip.Addr) {
	t.Helper()
	cmd := exec.Command("iptables-nft-restore", "--noflush")
	cmd.Stdin = strings.NewReader(strings.ReplaceAll(serviceRules, "POD", endpoint.String()))
	var out []byte
	if err := n.Do(func() (err error) { out, err = cmd.CombinedOutput(); return err }); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// serve runs the endpoint: it sends the client's address as a line and echoes all data.
func serve(t *testing.T, pod *lab.Pod) {
	t.Helper()
	at := netip.AddrPortFrom(pod.Addr(true), 8080).String()
	l, err := pod.Listen(t.Context(), "tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	u, err := pod.ListenPacket(t.Context(), "udp", at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close(); u.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				fmt.Fprintln(c, c.RemoteAddr())
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	go func() {
		for b := make([]byte, 2048); ; {
			k, from, err := u.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = u.WriteTo(append([]byte(from.String()+"\n"), b[:k]...), from)
		}
	}()
}

// useService sends bytes to a service and checks that the same come back. It returns the
// client address that the endpoint saw.
func useService(ctx context.Context, from *lab.Namespace, network, to string) (netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	c, err := from.DialWith(ctx, net.Dialer{}, network, to)
	if err != nil {
		return netip.Addr{}, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return netip.Addr{}, err
	}
	payload := pattern(1300)
	if network == "tcp" {
		payload = pattern(4 << 20)
	}
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(payload)
		sent <- err
	}()
	r := bufio.NewReaderSize(c, 4096)
	line, err := r.ReadString('\n')
	if err != nil {
		return netip.Addr{}, err
	}
	got := make([]byte, len(payload))
	if _, err := io.ReadFull(r, got); err != nil {
		return netip.Addr{}, err
	}
	if err := <-sent; err != nil {
		return netip.Addr{}, err
	}
	if !bytes.Equal(got, payload) {
		return netip.Addr{}, fmt.Errorf("the echoed bytes differ from the sent ones")
	}
	seen, err := netip.ParseAddrPort(strings.TrimSpace(line))
	return seen.Addr(), err
}
