package firewall

import (
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// EachPacket returns a rule of another program that must see each packet of established
// connections between pods: it limits, logs, queues or copies them, or matches something
// that differs between the packets of a connection. Rules that match only addresses,
// ports, devices, marks and conntrack's state are not such rules. The text says where the
// rule is; it is empty if there is none.
func EachPacket(have Reading, want Policy, d Devices) string {
	if have.others.bridge != "" {
		return fmt.Sprintf("the chain %s sees each frame of the pods' bridge", have.others.bridge)
	}
	for _, n := range want.Forward {
		for _, p := range established(forwarded(n, d.Pods, d.Tunnels[n])) {
			for _, hook := range []*nftables.ChainHook{nftables.ChainHookPrerouting, nftables.ChainHookForward, nftables.ChainHookPostrouting} {
				if text := have.others.set.eachPacket(*hook, p); text != "" {
					return text
				}
			}
		}
	}
	return ""
}

// established returns the probes for connections of TCP and UDP as they are after their
// first packet, and for unanswered UDP, whose every packet is in conntrack's state new.
func established(probes []probe) []probe {
	var all []probe
	for _, p := range probes {
		switch p.proto {
		case unix.IPPROTO_UDP:
			all = append(all, p)
		case unix.IPPROTO_TCP:
			p.transport = slices.Clone(p.transport)
			copy(p.transport[13:], known(0x10)) // ACK
		default:
			continue
		}
		p.stateNew = false
		all = append(all, p)
	}
	return all
}

// eachPacket walks a probe through the base chains at a hook.
func (s ruleset) eachPacket(hook nftables.ChainHook, p probe) string {
	for _, c := range s.chains {
		if !c.base || c.hook != hook || !c.sees(p) {
			continue
		}
		w := walker{set: s, base: c, probe: p, narrow: true}
		if w.walk(c, arrival{sure: every}); w.each != nil {
			return fmt.Sprintf("%s, chain %s, %s", tableText(c), w.each.chain, w.each.rule())
		}
	}
	return ""
}

// perPacket names the expression of a rule that must see each packet; empty if there is
// none. The names are those of nft and iptables.
func (p probe) perPacket(e expr.Any) string {
	switch e := e.(type) {
	case *expr.Limit:
		return "limit"
	case *expr.Quota:
		return "quota"
	case *expr.Log:
		return "log"
	case *expr.Queue:
		return "queue"
	case *expr.Dup:
		return "dup"
	case *expr.TProxy:
		return "tproxy"
	case *expr.Numgen:
		return "numgen"
	case *expr.Dynset:
		return "update of a set"
	case *expr.Exthdr:
		return "option"
	case *expr.Objref:
		const quota, limit = 2, 4 // NFT_OBJECT_QUOTA, NFT_OBJECT_LIMIT
		if e.Type == quota || e.Type == limit {
			return "limit " + e.Name
		}
	case *expr.Meta:
		if e.Key == expr.MetaKeyLEN && !e.SourceRegister {
			return "meta length"
		}
	case *expr.Ct:
		if slices.Contains([]expr.CtKey{expr.CtKeyBYTES, expr.CtKeyPKTS, expr.CtKeyAVGPKT}, e.Key) {
			return "ct bytes"
		}
	case *expr.Payload:
		if e.OperationType == expr.PayloadLoad && !p.perConnection(e) {
			return "payload"
		}
	case *expr.Match:
		if slices.Contains(perPacketMatches, e.Name) {
			return "-m " + e.Name
		}
	case *expr.Target:
		if slices.Contains(perPacketTargets, e.Name) {
			return "-j " + e.Name
		}
	}
	return ""
}

// Extensions of x_tables (linux/netfilter/xt_*.h) that must see each packet.
var (
	perPacketMatches = []string{
		"bpf", "connbytes", "dscp", "ecn", "hashlimit", "hl", "length", "limit", "nfacct", "quota", "recent", "statistic", "string", "tos", "ttl", "u32",
	}
	perPacketTargets = []string{"AUDIT", "LOG", "NFLOG", "NFQUEUE", "RATEEST", "TEE", "TPROXY", "ULOG"}
)

// perConnection reports whether all packets of a direction of a connection have the same
// bytes where the expression loads them. TCP's flags are among them, since packets with
// flags other than ACK never bypass the host.
func (p probe) perConnection(e *expr.Payload) bool {
	within := func(spans ...[2]uint32) bool {
		return slices.ContainsFunc(spans, func(s [2]uint32) bool { return e.Offset >= s[0] && e.Offset+e.Len <= s[1] })
	}
	switch {
	case e.Base == expr.PayloadBaseLLHeader:
		return true
	case e.Base == expr.PayloadBaseTransportHeader:
		return within([2]uint32{0, 4}, [2]uint32{13, 14})
	case e.Base != expr.PayloadBaseNetworkHeader:
		return false
	case p.is4: // version, fragment, protocol, addresses
		return within([2]uint32{0, 1}, [2]uint32{6, 8}, [2]uint32{9, 10}, [2]uint32{12, 20})
	}
	return within([2]uint32{6, 7}, [2]uint32{8, 40}) // next header, addresses
}
