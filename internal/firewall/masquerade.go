package firewall

import (
	"net/netip"

	"github.com/google/nftables/expr"
)

// Masquerade translates the source of traffic that leaves the cluster network
// to the node's address, for one address family. Traffic within the network is
// not translated.
type Masquerade struct {
	Network netip.Prefix // the cluster network
	Subnet  netip.Prefix // this node's subnet
	// Except are destinations for which the pod's address is kept.
	Except []netip.Prefix
}

// kubeMark marks packets that kube-proxy masquerades itself.
const kubeMark = 0x4000

// rules returns the masquerading rules of one family, equivalent to flannel's
// except for spoofed pod addresses:
//
//  1. to an excepted network: keep the pod's address
//  2. pods to pods: no translation. flannel would translate the source if it is a pod
//     of another node; here it stays, and the tunnel drops it as spoofed
//  3. others to this node's pods: no translation, so that the pod sees the client
//  4. pods to anywhere else except multicast: the node's address
//  5. others to other nodes' pods: the node's address, so that replies return here
func (m Masquerade) rules() []rule {
	is4 := m.Network.Addr().Is4()
	multicast := netip.MustParsePrefix("224.0.0.0/4")
	if !is4 {
		multicast = netip.MustParsePrefix("ff00::/8")
	}
	masquerade := rule{"masquerade fully-random", masqueradeExprs(), ""}
	var lines []rule
	for _, p := range m.Except {
		lines = append(lines, all(familyIs(is4, ""), address("daddr", true, p), leave()))
	}
	return append(lines,
		all(familyIs(is4, ""), address("saddr", true, m.Network), address("daddr", true, m.Network), leave()),
		all(familyIs(is4, ""), address("daddr", true, m.Subnet), leave()),
		all(familyIs(is4, ""), address("saddr", true, m.Network), address("daddr", false, multicast), masquerade),
		all(familyIs(is4, ""), address("saddr", false, m.Network), address("daddr", true, m.Network), masquerade),
	)
}

func masqueradeExprs() []expr.Any { return []expr.Any{&expr.Masq{FullyRandom: true}} }
