package host

import (
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Policy rules (ip-rule(8)) and IPsec policies take precedence over the main table, which
// has culvert's routes. Other programs or the administrator create them.

// PolicyRules returns the rules of a family that are not the kernel's own three, as `ip rule`
// has them, with their priority first, and whether a rule for the main table exists.
func PolicyRules(is4 bool) (found []PolicyRule, main bool) {
	all, err := Retry(func() ([]netlink.Rule, error) { return netlink.RuleList(family(is4)) })
	if err != nil {
		return nil, true // a kernel without policy routing
	}
	for _, r := range all {
		main = main || r.Table == unix.RT_TABLE_MAIN
		switch [2]int{r.Priority, r.Table} {
		case [2]int{0, unix.RT_TABLE_LOCAL}, [2]int{32766, unix.RT_TABLE_MAIN}, [2]int{32767, unix.RT_TABLE_DEFAULT}:
			continue
		}
		found = append(found, PolicyRule{r.Priority, ruleText(r)})
	}
	return found, main
}

// PolicyRule is a rule of policy routing.
type PolicyRule struct {
	Priority int
	Text     string // without the priority
}

func (r PolicyRule) String() string { return fmt.Sprintf("%d: %s", r.Priority, r.Text) }

func ruleText(r netlink.Rule) string {
	words := []string{"from " + netText(r.Src)}
	if r.Invert {
		words[0] = "not " + words[0]
	}
	for _, w := range []struct {
		there bool
		text  string
	}{
		{r.Dst != nil, "to " + netText(r.Dst)},
		{r.Mark != 0, fmt.Sprintf("fwmark %#x", r.Mark)},
		{r.IifName != "", "iif " + r.IifName},
		{r.OifName != "", "oif " + r.OifName},
		{r.Table == 0 && r.Goto <= 0, "prohibit, unreachable or blackhole"}, // the library does not decode the type
		{r.Table > 0, fmt.Sprintf("lookup %d", r.Table)},
	} {
		if w.there {
			words = append(words, w.text)
		}
	}
	return strings.Join(words, " ")
}

// IPsecBlock is an IPsec policy (ip-xfrm(8)) that drops what it matches.
type IPsecBlock struct {
	Dir      string // in, out or fwd
	From, To netip.Prefix
}

func (b IPsecBlock) selector() string {
	return fmt.Sprintf("src %s dst %s dir %s", b.From, b.To, b.Dir)
}

func (b IPsecBlock) String() string { return "the IPsec policy " + b.selector() + " action block" }

// Fix is the command that removes the policy.
func (b IPsecBlock) Fix() string { return "ip xfrm policy delete " + b.selector() }

// Matches reports whether packets from one network to another may match the policy.
func (b IPsecBlock) Matches(from, to netip.Prefix) bool {
	return b.From.Overlaps(from) && b.To.Overlaps(to)
}

// IPsecBlocks returns the policies of a family that drop packets.
func IPsecBlocks(is4 bool) []IPsecBlock {
	all, err := Retry(func() ([]netlink.XfrmPolicy, error) { return netlink.XfrmPolicyList(family(is4)) })
	if err != nil {
		return nil // a kernel without IPsec
	}
	var found []IPsecBlock
	for _, p := range all {
		if p.Action == netlink.XFRM_POLICY_BLOCK {
			found = append(found, IPsecBlock{strings.TrimPrefix(p.Dir.String(), "dir "), selectorOf(p.Src, is4), selectorOf(p.Dst, is4)})
		}
	}
	return found
}

// selectorOf converts a selector's network; nil is everything.
func selectorOf(n *net.IPNet, is4 bool) netip.Prefix {
	everything := netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	if is4 {
		everything = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	if n == nil {
		return everything
	}
	a, ok := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	if !ok || a.Unmap().Is4() != is4 {
		return everything
	}
	return netip.PrefixFrom(a.Unmap(), bits)
}

func netText(n *net.IPNet) string {
	if n == nil || n.IP == nil {
		return "all"
	}
	return n.String()
}

func family(is4 bool) int {
	if is4 {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}
