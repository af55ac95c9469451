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

	"github.com/google/nftables"

	"culvert/internal/firewall"
	"culvert/internal/host"
	"culvert/internal/lab"
)

// dropForward creates the FORWARD chains of iptables-nft, with the policy drop
// that Docker sets.
func dropForward(t *testing.T, n *lab.Node) {
	t.Helper()
	inside(t, n, func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		drop := nftables.ChainPolicyDrop
		for _, family := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6} {
			c.AddChain(&nftables.Chain{
				Name: "FORWARD", Table: c.AddTable(&nftables.Table{Family: family, Name: "filter"}), Type: nftables.ChainTypeFilter,
				Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &drop,
			})
		}
		return c.Flush()
	})
}

// TestForwardDrop inserts the accepts where another program drops, checks that
// they are stable, and removes them; the other program's rules stay unchanged.
func TestForwardDrop(t *testing.T) {
	n := node(t)
	want := host.State{Firewall: firewall.Policy{Forward: []netip.Prefix{netip.MustParsePrefix("10.5.0.0/16"), netip.MustParsePrefix("fd00:5::/48")}}}
	if got := apply(t, n, want); len(got) != 0 {
		t.Errorf("where nobody drops: %q", got)
	}
	dropForward(t, n)
	golden := []string{
		"iptables -A FORWARD -d 10.5.0.0/16 -m comment --comment culvert -j ACCEPT",
		"iptables -A FORWARD -s 10.5.0.0/16 -m comment --comment culvert -j ACCEPT",
		"ip6tables -A FORWARD -d fd00:5::/48 -m comment --comment culvert -j ACCEPT",
		"ip6tables -A FORWARD -s fd00:5::/48 -m comment --comment culvert -j ACCEPT",
	}
	if got := apply(t, n, want); !slices.Equal(got, golden) {
		t.Errorf("where FORWARD drops:\n%s", strings.Join(got, "\n"))
	}
	if got := apply(t, n, want); len(got) != 0 {
		t.Errorf("a second time: %q", got)
	}
	for i := range golden {
		golden[i] = strings.Replace(golden[i], " -A ", " -D ", 1)
	}
	if got := apply(t, n, host.State{}); !slices.Equal(got, golden) {
		t.Errorf("cleanup:\n%s", strings.Join(got, "\n"))
	}
	inside(t, n, func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		chains, err := c.ListChains()
		for _, ch := range chains {
			if ch.Policy == nil || *ch.Policy != nftables.ChainPolicyDrop {
				t.Errorf("the chain of %s is another now", ch.Table.Name)
			}
		}
		if len(chains) != 2 {
			t.Errorf("%d chains", len(chains))
		}
		return err
	})
}

// TestIptablesSave saves our rules with iptables-save, restores them and saves
// them again: they keep their meaning and are still recognized and removed as
// ours. Cases: FORWARD with policy drop, FORWARD with a final reject, and
// Docker's chains.
func TestIptablesSave(t *testing.T) {
	for _, program := range []string{"iptables-nft", "iptables-nft-save", "iptables-nft-restore"} {
		if _, err := exec.LookPath(program); err != nil {
			if os.Getenv("CULVERT_FULL") != "" {
				t.Fatal(err)
			}
			t.Skip("needs iptables: make test-system installs it, and runs this test")
		}
	}
	accept := []string{
		"-A CHAIN -s 10.5.0.0/16 -m comment --comment culvert -j ACCEPT",
		"-A CHAIN -d 10.5.0.0/16 -m comment --comment culvert -j ACCEPT",
	}
	for _, c := range []struct {
		name, setup, chain string
		first              bool // ours must precede the others
	}{
		{"policy", "-P FORWARD DROP", "FORWARD", false},
		{"reject", "-A FORWARD -j REJECT --reject-with icmp-host-prohibited", "FORWARD", true},
		{"docker", "-P FORWARD DROP;-N DOCKER-USER;-A DOCKER-USER -j RETURN;-A FORWARD -j DOCKER-USER", "DOCKER-USER", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := node(t)
			run := func(stdin string, words ...string) string {
				var out []byte
				inside(t, n, func() error {
					cmd := exec.Command(words[0], words[1:]...)
					cmd.Stdin = strings.NewReader(stdin)
					var err error
					out, err = cmd.CombinedOutput()
					if err != nil {
						t.Errorf("%v: %s", words, out)
					}
					return err
				})
				return string(out)
			}
			rules := func(saved string) (all []string) {
				for line := range strings.Lines(saved) {
					if strings.HasPrefix(line, "-A "+c.chain+" ") {
						all = append(all, strings.TrimSpace(line))
					}
				}
				return all
			}
			for command := range strings.SplitSeq(c.setup, ";") {
				run("", append([]string{"iptables-nft"}, strings.Fields(command)...)...)
			}
			want := host.State{Firewall: firewall.Policy{Forward: []netip.Prefix{netip.MustParsePrefix("10.5.0.0/16")}}}
			apply(t, n, want)
			saved := run("", "iptables-nft-save")
			got := rules(saved)
			var ours []string
			for _, a := range accept {
				line := strings.Replace(a, "CHAIN", c.chain, 1)
				if !slices.Contains(got, line) {
					t.Fatalf("iptables-save lacks %q:\n%s", line, saved)
				}
				ours = append(ours, line)
			}
			if c.first && !slices.Contains(ours, got[0]) {
				t.Errorf("ours do not come first: %q", got)
			}
			run("", "iptables-nft", "-F")
			run(saved, "iptables-nft-restore")
			if again := rules(run("", "iptables-nft-save")); !slices.Equal(again, got) {
				t.Errorf("saved, restored and saved again:\n%q\nbefore\n%q", again, got)
			}
			if changes := apply(t, n, want); len(changes) != 0 {
				t.Errorf("restored, there was to change: %q", changes)
			}
			if changes := apply(t, n, host.State{}); len(changes) != 2 {
				t.Errorf("cleanup: %q", changes)
			}
			if left := run("", "iptables-nft-save"); strings.Contains(left, "culvert") {
				t.Errorf("left over:\n%s", left)
			}
		})
	}
}

// TestObstaclesAreNamed sets up drops that our accepts cannot prevent: in
// another nft table and, where installed, in legacy iptables.
func TestObstaclesAreNamed(t *testing.T) {
	n := node(t)
	inside(t, n, func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		drop := nftables.ChainPolicyDrop
		c.AddChain(&nftables.Chain{
			Name: "fence", Table: c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "castle"}), Type: nftables.ChainTypeFilter,
			Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &drop,
		})
		return c.Flush()
	})
	want := []string{"nftables, table inet castle, chain fence, by its policy drops packets of the cluster network 10.5.0.0/16"}
	if _, err := exec.LookPath("iptables-legacy"); err == nil {
		inside(t, n, func() error {
			if exec.Command("iptables-legacy", "-P", "FORWARD", "DROP").Run() == nil { // the kernel may lack it
				want = append(want, "iptables-legacy, table filter, chain FORWARD, by its policy drops")
			}
			return nil
		})
	}
	k := host.NewKeeper(0, slog.New(slog.DiscardHandler))
	inside(t, n, func() error {
		return k.Apply(func(host.View) (host.State, error) {
			return host.State{Firewall: firewall.Policy{Forward: []netip.Prefix{netip.MustParsePrefix("10.5.0.0/16")}}}, nil
		})
	})
	got := fmt.Sprint(k.Status().Obstacles)
	for _, w := range want {
		if !strings.Contains(got, w) {
			t.Errorf("%q is not named in %q", w, got)
		}
	}
	t.Log(got)
}
