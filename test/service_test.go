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

// serviceTable holds the rules of kube-proxy in nftables mode for the same service.
const serviceTable = `add table ip kube-proxy
add chain ip kube-proxy mark-for-masquerade
add chain ip kube-proxy endpoint-1
add chain ip kube-proxy endpoint-2
add chain ip kube-proxy service-1
add chain ip kube-proxy service-2
add chain ip kube-proxy external-1
add chain ip kube-proxy services
add chain ip kube-proxy masquerading
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100 ; }
add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority 100 ; }
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict ; }
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy nat-output jump services
add rule ip kube-proxy nat-postrouting jump masquerading
add rule ip kube-proxy mark-for-masquerade meta mark set meta mark or 0x4000
add rule ip kube-proxy masquerading meta mark and 0x4000 == 0 return
add rule ip kube-proxy masquerading meta mark set meta mark xor 0x4000
add rule ip kube-proxy masquerading masquerade fully-random
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services fib daddr type local ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @service-nodeports
add rule ip kube-proxy service-1 ip daddr 10.96.0.10 tcp dport 80 ip saddr != 10.5.0.0/16 jump mark-for-masquerade
add rule ip kube-proxy service-1 numgen random mod 1 vmap { 0 : goto endpoint-1 }
add rule ip kube-proxy service-2 ip daddr 10.96.0.10 udp dport 80 ip saddr != 10.5.0.0/16 jump mark-for-masquerade
add rule ip kube-proxy service-2 numgen random mod 1 vmap { 0 : goto endpoint-2 }
add rule ip kube-proxy external-1 jump mark-for-masquerade
add rule ip kube-proxy external-1 goto service-1
add rule ip kube-proxy endpoint-1 ip saddr POD jump mark-for-masquerade
add rule ip kube-proxy endpoint-1 meta l4proto tcp dnat to POD:8080
add rule ip kube-proxy endpoint-2 ip saddr POD jump mark-for-masquerade
add rule ip kube-proxy endpoint-2 meta l4proto udp dnat to POD:8080
add element ip kube-proxy service-ips { 10.96.0.10 . tcp . 80 : goto service-1, 10.96.0.10 . udp . 80 : goto service-2 }
add element ip kube-proxy service-nodeports { tcp . 30080 : goto external-1 }
`

// policyRules are the iptables rules of a NetworkPolicy for the endpoint: only one pod
// may open connections to it, by TCP.
const policyRules = `*filter
:POLICY - [0:0]
-A FORWARD -d POD/32 -j POLICY
-A POLICY -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A POLICY -s FRIEND/32 -p tcp -m tcp --dport 8080 -j ACCEPT
-A POLICY -j DROP
COMMIT
`

// TestServices reaches a service through each datapath, with kube-proxy's rules in
// iptables and nftables mode, with a NetworkPolicy, and with masquerading:
//
//	pod1 on n1, n1 itself ── ClusterIP ──┐
//	outside ── NodePort of n1 ───────────┼── n1 ── underlay ── n2 ── pod2, the endpoint
//	pod2 ── ClusterIP, to itself ────────┘                            (on n2)
func TestServices(t *testing.T) {
	for _, program := range []string{"iptables-nft-restore", "nft"} {
		if _, err := exec.LookPath(program); err != nil {
			if os.Getenv("CULVERT_FULL") != "" {
				t.Fatal(err)
			}
			t.Skipf("needs %s: make test-system installs it and runs this test", program)
		}
	}
	for name, flags := range map[string][]string{
		"kernel": {"--datapath", "kernel", "--fast-path", "off"}, "fast path": {"--datapath", "kernel", "--fast-path", "on"}, "userspace": {"--datapath", "userspace"},
		"pod to pod": {"--datapath", "kernel", "--fast-path", "pod"},
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
			stranger, err := c.Nodes[0].AddPod(t.Context(), "p2")
			if err != nil {
				t.Fatal(err)
			}
			endpoint := pods[1].Addr(true)
			serve(t, pods[1].Namespace, endpoint)
			outside := c.FabricAddrs[0]
			serve(t, c.Fabric, outside)
			const clusterIP, udp = "10.96.0.10:80", "udp"
			direct := netip.AddrPortFrom(endpoint, 8080).String()
			type use struct {
				name        string
				from        *lab.Namespace
				network, to string
				seenAs      netip.Addr // by the endpoint; the zero Addr: it must not be reached
			}
			services := []use{
				{"from a pod to the ClusterIP", pods[0].Namespace, "tcp", clusterIP, pods[0].Addr(true)},
				{"from a pod to the ClusterIP", pods[0].Namespace, udp, clusterIP, pods[0].Addr(true)},
				{"from the node to the ClusterIP", c.Nodes[0].Namespace, "tcp", clusterIP, subnets[0].Addr()},
				{"from outside to the NodePort", c.Fabric, "tcp", netip.AddrPortFrom(c.Nodes[0].Addrs[0], 30080).String(), subnets[0].Addr()},
				{"from the endpoint itself to the ClusterIP (hairpin)", pods[1].Namespace, "tcp", clusterIP, subnets[1].Addr().Next()},
			}
			for _, rules := range []struct {
				name     string
				put, end []string // commands; the first reads text
				text     string
				uses     []use
			}{
				{"kube-proxy in iptables mode", []string{"iptables-nft-restore", "--noflush"}, []string{"iptables-nft", "-t", "nat", "-F"}, serviceRules, services},
				{"kube-proxy in nftables mode", []string{"nft", "-f", "-"}, []string{"nft", "delete", "table", "ip", "kube-proxy"}, serviceTable, services},
				{"NetworkPolicy by iptables", []string{"iptables-nft-restore", "--noflush"}, []string{"iptables-nft", "-F", "POLICY"}, policyRules, []use{
					{"from the allowed pod", pods[0].Namespace, "tcp", direct, pods[0].Addr(true)},
					{"from the allowed pod by UDP, which is not allowed", pods[0].Namespace, udp, direct, netip.Addr{}},
					{"from another pod", stranger.Namespace, "tcp", direct, netip.Addr{}},
					{"from the endpoint as a client", pods[1].Namespace, "tcp", netip.AddrPortFrom(outside, 8080).String(), c.Nodes[1].Addrs[0]},
				}},
				{"masquerading", nil, nil, "", []use{
					{"from a pod to outside", pods[0].Namespace, "tcp", netip.AddrPortFrom(outside, 8080).String(), c.Nodes[0].Addrs[0]},
					{"from a pod to outside", pods[0].Namespace, udp, netip.AddrPortFrom(outside, 8080).String(), c.Nodes[0].Addrs[0]},
					{"from another pod", stranger.Namespace, "tcp", direct, stranger.Addr(true)},
				}},
			} {
				for _, n := range c.Nodes {
					if rules.put != nil {
						text := strings.NewReplacer("POD", endpoint.String(), "FRIEND", pods[0].Addr(true).String()).Replace(rules.text)
						command(t, n, text, rules.put)
					}
				}
				for _, u := range rules.uses {
					within := 20 * time.Second
					if !u.seenAs.IsValid() {
						within = 500 * time.Millisecond
					}
					seen, err := useService(t.Context(), u.from, u.network, u.to, within)
					switch {
					case err != nil && u.seenAs.IsValid():
						t.Errorf("%s: %s, %s: %v", rules.name, u.name, u.network, err)
					case seen != u.seenAs:
						t.Errorf("%s: %s, %s: the endpoint saw %s, want %s", rules.name, u.name, u.network, seen, u.seenAs)
					}
				}
				for _, n := range c.Nodes {
					if rules.end != nil {
						command(t, n, "", rules.end)
					}
				}
			}
			if name != "fast path" {
				return
			}
			for _, n := range c.Nodes {
				if f := c.fastPath(n); f.Egress.Packets == 0 || f.Ingress.Packets == 0 {
					t.Errorf("%s: no packets took the fast path: %+v", n.ID, f)
				}
			}
		})
	}
}

// command runs a program on a node, with text as its standard input.
func command(t *testing.T, n *lab.Node, text string, words []string) {
	t.Helper()
	cmd := exec.Command(words[0], words[1:]...)
	cmd.Stdin = strings.NewReader(text)
	var out []byte
	if err := n.Do(func() (err error) { out, err = cmd.CombinedOutput(); return err }); err != nil {
		t.Fatalf("%q: %v: %s", words, err, out)
	}
}

// serve runs the endpoint: it sends the client's address as a line and echoes all data.
func serve(t *testing.T, pod *lab.Namespace, addr netip.Addr) {
	t.Helper()
	at := netip.AddrPortFrom(addr, 8080).String()
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
func useService(ctx context.Context, from *lab.Namespace, network, to string, within time.Duration) (netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	c, err := from.DialWith(ctx, net.Dialer{}, network, to)
	if err != nil {
		return netip.Addr{}, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(within)); err != nil {
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
