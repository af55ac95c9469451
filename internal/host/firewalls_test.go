package host_test

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"culvert/internal/api"
	"culvert/internal/firewall"
	"culvert/internal/host"
	"culvert/internal/lab"
)

// TestRealFirewalls lets iptables and nft write the rules of common firewalls,
// and checks the accepts that are inserted and the obstacles that are reported.
func TestRealFirewalls(t *testing.T) {
	for _, program := range []string{"iptables-nft", "nft"} {
		if _, err := exec.LookPath(program); err != nil {
			if os.Getenv("CULVERT_FULL") != "" {
				t.Fatal(err)
			}
			t.Skip("needs iptables and nft: make test-system installs them, and runs this test")
		}
	}
	const (
		forward = "-s 10.5.0.0/16"
		input   = "-p udp --dport 8472"
	)
	want := host.State{Firewall: firewall.Policy{
		Forward: []netip.Prefix{netip.MustParsePrefix("10.5.0.0/16")},
		Tunnels: []firewall.TunnelRule{{
			Port: 8472, VNI: 1, Network: netip.MustParsePrefix("10.5.0.0/16"), Device: "cvt.1", Subnet: netip.MustParsePrefix("10.5.1.0/24"),
			Peers: []firewall.Source{
				{Outer: netip.MustParseAddr("192.168.50.12"), Inner: netip.MustParsePrefix("10.5.2.0/24")},
				{Outer: netip.MustParseAddr("192.168.50.13"), Inner: netip.MustParsePrefix("10.5.3.0/24")},
			},
		}},
	}}
	for _, c := range []struct {
		name  string
		setup string   // commands, one per line; iptables stands for iptables-nft
		put   []string // our rules that must be inserted: chain, position, match
		said  []string // text of each expected warning; no others are allowed
	}{
		{name: "nothing"},
		{
			name: "F1 ufw",
			setup: `iptables -N ufw-reject-forward
				iptables -A ufw-reject-forward -j REJECT
				iptables -A FORWARD -j ufw-reject-forward
				iptables -P FORWARD DROP`,
			put: []string{"FORWARD 1 " + forward},
		},
		{
			name: "the whole of ufw",
			setup: `iptables -N ufw-before-logging-forward
				iptables -N ufw-before-forward
				iptables -N ufw-user-forward
				iptables -N ufw-user-limit
				iptables -N ufw-after-forward
				iptables -N ufw-after-logging-forward
				iptables -N ufw-reject-forward
				iptables -N ufw-track-forward
				iptables -A FORWARD -j ufw-before-logging-forward
				iptables -A FORWARD -j ufw-before-forward
				iptables -A FORWARD -j ufw-after-forward
				iptables -A FORWARD -j ufw-after-logging-forward
				iptables -A FORWARD -j ufw-reject-forward
				iptables -A FORWARD -j ufw-track-forward
				iptables -A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
				iptables -A ufw-before-forward -m conntrack --ctstate INVALID -j DROP
				iptables -A ufw-before-forward -p icmp --icmp-type 3 -j ACCEPT
				iptables -A ufw-before-forward -p icmp --icmp-type 8 -j ACCEPT
				iptables -A ufw-before-forward -j ufw-user-forward
				iptables -A ufw-after-logging-forward -m limit --limit 3/min --limit-burst 10 -j LOG
				iptables -A ufw-reject-forward -j REJECT
				iptables -P FORWARD DROP`,
			put: []string{"FORWARD 5 " + forward},
		},
		{
			name: "a rule that drops, four jumps deep, behind goto and return",
			setup: `iptables -N a
				iptables -N b
				iptables -N c
				iptables -N d
				iptables -A FORWARD -i lo -j DROP
				iptables -A FORWARD -j a
				iptables -A a -s 172.16.0.0/12 -j RETURN
				iptables -A a -g b
				iptables -A a -j ACCEPT
				iptables -A b -p tcp --dport 22 -j RETURN
				iptables -A b -j c
				iptables -A c -j d
				iptables -A d -m addrtype --dst-type LOCAL -j ACCEPT
				iptables -A d -j DROP`,
			put: []string{"FORWARD 2 " + forward},
		},
		{
			name: "F2",
			setup: `iptables -A INPUT -i lo -j ACCEPT
				iptables -A INPUT -p tcp --dport 22 -j ACCEPT
				iptables -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
				iptables -P INPUT DROP`,
			put: []string{"INPUT 4 " + input},
		},
		{
			name: "INPUT that rejects at its end, and OUTPUT that drops",
			setup: `iptables -A INPUT -p icmp -j ACCEPT
				iptables -A INPUT -j REJECT --reject-with icmp-host-prohibited
				iptables -A OUTPUT -p tcp -j ACCEPT
				iptables -P OUTPUT DROP`,
			put: []string{"INPUT 2 " + input, "OUTPUT 2 " + input},
		},
		{
			name: "INPUT that accepts the peers",
			setup: `iptables -A INPUT -s 192.168.50.0/24 -p udp --dport 8472 -j ACCEPT
				iptables -P INPUT DROP`,
		},
		{
			name: "INPUT that accepts each peer",
			setup: `iptables -A INPUT -s 192.168.50.12 -p udp -m multiport --dports 51820,8472 -j ACCEPT
				iptables -A INPUT -s 192.168.50.13 -j ACCEPT
				iptables -A INPUT -p udp --dport 8472 -j DROP
				iptables -P INPUT DROP`,
		},
		{
			name: "INPUT that accepts one peer of two",
			setup: `iptables -A INPUT -s 192.168.50.12 -j ACCEPT
				iptables -P INPUT DROP`,
			put: []string{"INPUT 2 " + input},
		},
		{
			name:  "an eaten port",
			setup: `iptables -A INPUT -p udp --dport 8472 -j DROP`,
			said:  []string{"input-drop iptables, table filter, chain INPUT, rule 1 (drop, handle 2), drops the tunnel's packets (UDP port 8472) from peers"},
		},
		{
			name:  "a network that somebody shuts",
			setup: `iptables -A FORWARD -d 10.5.0.0/16 -j DROP`,
			said:  []string{"forward-drop iptables, table filter, chain FORWARD, rule 1 (drop"},
		},
		{
			name: "drops for a pod, a port, another network, and what is invalid",
			setup: `iptables -A FORWARD -s 10.5.1.7 -j DROP
				iptables -A FORWARD -p tcp --dport 25 -j DROP
				iptables -A FORWARD -p tcp -m tcp ! --syn -m conntrack --ctstate NEW -j DROP
				iptables -A FORWARD -d 172.17.0.0/16 -j DROP
				iptables -A FORWARD -i docker0 ! -o docker0 -j DROP
				iptables -A FORWARD -m mark --mark 0x8000/0x8000 -j DROP
				iptables -A FORWARD -m conntrack --ctstate INVALID -j DROP
				iptables -A FORWARD -m pkttype --pkt-type broadcast -j DROP
				iptables -t raw -A PREROUTING -m rpfilter --invert -j DROP`,
		},
		{
			name:  "a match that cannot be read",
			setup: `iptables -A FORWARD -m recent --name bad --rcheck -j DROP`,
			said:  []string{"forward-drop iptables, table filter, chain FORWARD, rule 1 (drop, handle 2), may drop"},
		},
		{
			name:  "mangle",
			setup: `iptables -t mangle -A PREROUTING -p udp -j DROP`,
			said: []string{
				"forward-drop iptables, table mangle, chain PREROUTING, rule 1",
				"input-drop iptables, table mangle, chain PREROUTING, rule 1",
			},
		},
		{
			name: "firewalld",
			setup: `nft add table inet firewalld
				nft add chain inet firewalld filter_FORWARD { type filter hook forward priority filter + 10 ; }
				nft add chain inet firewalld filter_FWD_public
				nft add chain inet firewalld filter_INPUT { type filter hook input priority filter + 10 ; }
				nft add rule inet firewalld filter_INPUT ct state { established, related } accept
				nft add rule inet firewalld filter_INPUT ct status dnat accept
				nft add rule inet firewalld filter_INPUT iifname lo accept
				nft add rule inet firewalld filter_INPUT ct state invalid drop
				nft add rule inet firewalld filter_INPUT tcp dport 22 accept
				nft add rule inet firewalld filter_INPUT reject with icmpx admin-prohibited
				nft add rule inet firewalld filter_FORWARD ct state { established, related } accept
				nft add rule inet firewalld filter_FORWARD iifname eth7 goto filter_FWD_public
				nft add rule inet firewalld filter_FORWARD goto filter_FWD_public
				nft add rule inet firewalld filter_FWD_public reject with icmpx admin-prohibited`,
			said: []string{
				"forward-drop nftables, table inet firewalld, chain filter_FORWARD, rule 3 (goto filter_FWD_public, handle 14), chain filter_FWD_public, rule 1 (reject, handle 15), drops",
				"input-drop nftables, table inet firewalld, chain filter_INPUT, rule 6 (reject, handle",
			},
		},
		{
			name: "verdict maps and sets that let everything through",
			setup: `nft add table inet filter
				nft add set inet filter nodes { type ipv4_addr ; flags interval ; }
				nft add element inet filter nodes { 192.168.50.12-192.168.50.20 }
				nft add chain inet filter forward { type filter hook forward priority filter ; policy drop ; }
				nft add chain inet filter input { type filter hook input priority filter ; policy drop ; }
				nft add chain inet filter pods
				nft add rule inet filter pods ip daddr { 10.5.0.0/16, 10.6.0.0/16 } accept
				nft add rule inet filter forward ct state vmap { established : accept, related : accept, invalid : drop }
				nft add rule inet filter forward ip saddr vmap { 10.0.0.0-10.255.255.255 : jump pods, 172.16.0.0/12 : drop }
				nft add rule inet filter input ip saddr @nodes udp dport { 53, 8000-9000 } accept`,
		},
		{
			name: "verdict maps and sets that do not",
			setup: `nft add table inet filter
				nft add set inet filter nodes { type ipv4_addr ; flags interval ; }
				nft add element inet filter nodes { 192.168.50.13-192.168.50.20 }
				nft add chain inet filter forward { type filter hook forward priority filter ; policy drop ; }
				nft add chain inet filter input { type filter hook input priority filter ; policy drop ; }
				nft add rule inet filter forward ct state vmap { established : accept, new : drop }
				nft add rule inet filter input ip saddr @nodes udp dport { 53, 8000-9000 } accept`,
			said: []string{
				"forward-drop nftables, table inet filter, chain forward, rule 1 (drop",
				"input-drop nftables, table inet filter, chain input, by its policy drops",
			},
		},
		{
			name: "the iptables of old",
			setup: `iptables-legacy -N ufw-reject-forward
				iptables-legacy -N ufw-skip
				iptables-legacy -A ufw-skip -p tcp -m tcp --dport 22 -j ACCEPT
				iptables-legacy -A ufw-reject-forward -s 192.0.2.0/24 -j RETURN
				iptables-legacy -A ufw-reject-forward -g ufw-skip
				iptables-legacy -A ufw-reject-forward -j DROP
				iptables-legacy -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
				iptables-legacy -A FORWARD -i docker0 ! -o docker0 -j DROP
				iptables-legacy -A FORWARD ! -s 10.0.0.0/8 -j DROP
				iptables-legacy -A FORWARD -j ufw-reject-forward
				iptables-legacy -A FORWARD -j REJECT
				iptables-legacy -A INPUT -i lo -j ACCEPT
				iptables-legacy -A INPUT -p udp -m udp --dport 53 -j ACCEPT
				iptables-legacy -P INPUT DROP
				ip6tables-legacy -P FORWARD DROP`,
			said: []string{
				"forward-drop iptables-legacy, table filter, chain FORWARD, rule 5 (REJECT), drops",
				"input-drop iptables-legacy, table filter, chain INPUT, by its policy drops",
			},
		},
		{
			name: "the iptables of old, which accept",
			setup: `iptables-legacy -P FORWARD DROP
				iptables-legacy -A FORWARD -s 10.5.0.0/16 -d 10.5.0.0/16 -i cni+ -j ACCEPT
				iptables-legacy -A FORWARD -s 10.5.0.0/16 -d 10.5.0.0/16 -o cni0 -j ACCEPT
				iptables-legacy -A INPUT -p udp -m multiport --dports 53,8472 -j ACCEPT
				iptables-legacy -P INPUT DROP`,
		},
		{
			name: "a chain on the wire",
			setup: `nft add table netdev guard
				nft add chain netdev guard wire { type filter hook ingress device "eth0" priority 0 ; }
				nft add rule netdev guard wire ip protocol udp drop`,
			said: []string{"input-drop nftables, table netdev guard, chain wire, rule 1"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := node(t)
			for line := range strings.Lines(c.setup) {
				words := strings.Fields(line)
				if len(words) == 0 {
					continue
				}
				if words[0] == "iptables" {
					words[0] = "iptables-nft"
				}
				if strings.Contains(words[0], "legacy") && !legacy(t, n) {
					t.Skip("the kernel lacks the iptables of old")
				}
				run(t, n, words...)
			}
			k := host.NewKeeper(linkIndex(t, n, "eth0"), slog.New(slog.DiscardHandler))
			apply := func() host.Status {
				inside(t, n, func() error { return k.Apply(func(host.View) (host.State, error) { return want, nil }) })
				return k.Status()
			}
			said := apply()
			saved := run(t, n, "iptables-nft-save")
			for _, p := range c.put {
				words := strings.SplitN(p, " ", 3)
				var rules []string
				for line := range strings.Lines(saved) {
					if strings.HasPrefix(line, "-A "+words[0]+" ") {
						rules = append(rules, strings.TrimSpace(line))
					}
				}
				at := slices.IndexFunc(rules, func(r string) bool { return strings.Contains(r, "culvert") })
				flat := strings.ReplaceAll(strings.Join(rules, "\n"), "-p udp -m udp ", "-p udp ")
				if at < 0 || fmt.Sprint(at+1) != words[1] || !strings.Contains(flat, words[2]+" -m comment --comment culvert -j ACCEPT") {
					t.Errorf("want %s, there is\n%s", p, strings.Join(rules, "\n"))
				}
			}
			if len(c.put) == 0 && strings.Contains(saved, "culvert") {
				t.Errorf("there was no need:\n%s", saved)
			}
			for _, w := range said.Obstacles {
				text := w.Check + " " + w.Text
				if !slices.ContainsFunc(c.said, func(s string) bool { return strings.Contains(text, s) }) {
					t.Errorf("a false alarm: %s", text)
				}
				if w.Fix == "" {
					t.Errorf("no remedy: %s", text)
				}
			}
			for _, s := range c.said {
				if !slices.ContainsFunc(said.Obstacles, func(w api.Warning) bool { return strings.Contains(w.Check+" "+w.Text, s) }) {
					t.Errorf("not said: %s\nbut %q", s, said.Obstacles)
				}
			}
			// The suggested fixes must work.
			for _, w := range said.Obstacles {
				if strings.Contains(w.Text, "may drop") {
					continue
				}
				for command := range strings.SplitSeq(w.Fix, "; ") {
					words := strings.Fields(command)
					if words[0] == "iptables" {
						words[0] = "iptables-nft"
					}
					run(t, n, words...)
				}
			}
			if left := apply().Obstacles; len(c.said) > 0 && !strings.Contains(fmt.Sprint(said.Obstacles), "may drop") && len(left) > 0 {
				t.Errorf("the remedies do not help: %v", left)
			}
			before := k.Status().Writes
			if apply(); k.Status().Writes != before {
				t.Error("a second time, there was to change")
			}
		})
	}
}

// legacy reports whether the kernel has legacy iptables.
func legacy(t *testing.T, n *lab.Node) bool {
	has := false
	inside(t, n, func() error {
		has = exec.Command("iptables-legacy", "-S").Run() == nil
		return nil
	})
	return has
}

// run runs a program in a node's network namespace.
func run(t *testing.T, n *lab.Node, words ...string) string {
	t.Helper()
	var out []byte
	inside(t, n, func() error {
		var err error
		if out, err = exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", words, out)
		}
		return err
	})
	return string(out)
}
