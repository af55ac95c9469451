package firewall

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/names"
)

// TracedDrop is a rule, or a chain's policy, that dropped a traced packet.
type TracedDrop struct {
	Family string `json:"family"`
	Table  string `json:"table"`
	Chain  string `json:"chain"`
	// Handle is the rule's handle; 0 for the chain's policy.
	Handle uint64 `json:"handle,omitempty"`
}

func (t TracedDrop) String() string {
	where := fmt.Sprintf("nftables, table %s %s, chain %s", t.Family, t.Table, t.Chain)
	if program := iptablesProgram(tableFamily(t.Family), t.Table); program != "" {
		where = fmt.Sprintf("%s, table %s, chain %s", program, t.Table, t.Chain)
	}
	if t.Handle == 0 {
		return where + ", by its policy, dropped the traced packet"
	}
	return fmt.Sprintf("%s, the rule with handle %d, dropped the traced packet", where, t.Handle)
}

// Fix returns the suggested remedy.
func (t TracedDrop) Fix() string {
	if t.Handle == 0 {
		return fmt.Sprintf("add an accept to the chain, or change its policy (`nft list chain %s %s %s`)", t.Family, t.Table, t.Chain)
	}
	return fmt.Sprintf("nft delete rule %s %s %s handle %d, or add an accept before it", t.Family, t.Table, t.Chain, t.Handle)
}

func tableFamily(text string) nftables.TableFamily {
	for _, f := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6, nftables.TableFamilyINet, nftables.TableFamilyNetdev, nftables.TableFamilyBridge} {
		if familyText(f) == text {
			return f
		}
	}
	return nftables.TableFamilyUnspecified
}

// Attributes of nftables' trace messages (linux/netfilter/nf_tables.h,
// NFTA_TRACE_...).
const (
	traceGroup   = 9  // NFNLGRP_NFTRACE
	traceMessage = 17 // NFT_MSG_TRACE

	traceTableName, traceChain, traceHandle, traceType, traceVerdict, tracePolicy = 1, 2, 3, 4, 5, 16

	verdictCode = 1 // NFTA_VERDICT_CODE
)

// TracePackets traces packets between two addresses through nftables, in both
// directions, until stop is called, which returns the rules that dropped some.
// It adds a table that only marks packets; stop deletes it.
func TracePackets(a, b netip.Addr, proto byte) (stop func() []TracedDrop, err error) {
	events, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("following packets: %w", err)
	}
	if err := events.JoinGroup(traceGroup); err != nil {
		_ = events.Close()
		return nil, fmt.Errorf("following packets: %w", err)
	}
	c, err := nftables.New()
	if err != nil {
		_ = events.Close()
		return nil, fmt.Errorf("opening nftables: %w", err)
	}
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: fmt.Sprintf("%s%d", names.TableTrace, os.Getpid())})
	for name, hook := range map[string]*nftables.ChainHook{"prerouting": nftables.ChainHookPrerouting, "output": nftables.ChainHookOutput} {
		ch := c.AddChain(&nftables.Chain{Name: name, Table: table, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityRef(-500)})
		for _, way := range [][2]netip.Addr{{a, b}, {b, a}} {
			from, to := netip.PrefixFrom(way[0], way[0].BitLen()), netip.PrefixFrom(way[1], way[1].BitLen())
			family := byte(unix.NFPROTO_IPV4)
			if a.Is6() {
				family = unix.NFPROTO_IPV6
			}
			exprs := []expr.Any{
				&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
				&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
			}
			exprs = append(exprs, address("saddr", true, from).exprs...)
			exprs = append(exprs, address("daddr", true, to).exprs...)
			exprs = append(exprs, &expr.Immediate{Register: 1, Data: []byte{1}}, &expr.Meta{Key: expr.MetaKeyNFTRACE, SourceRegister: true, Register: 1})
			c.AddRule(&nftables.Rule{Table: table, Chain: ch, Exprs: exprs})
		}
	}
	if err := c.Flush(); err != nil {
		_ = events.Close()
		return nil, fmt.Errorf("following packets: nftables: %w", err)
	}
	return func() []TracedDrop {
		c.DelTable(table)
		_ = c.Flush() // best effort: the table only marks packets
		defer events.Close()
		return readTrace(events)
	}, nil
}

// readTrace reads the trace messages received so far.
func readTrace(events *netlink.Conn) []TracedDrop {
	var all []TracedDrop
	for {
		_ = events.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		messages, err := events.Receive()
		if err != nil {
			if errors.Is(err, unix.ENOBUFS) {
				continue
			}
			return all
		}
		for _, m := range messages {
			if t, ok := parseTrace(m); ok && !slices.Contains(all, t) {
				all = append(all, t)
			}
		}
	}
}

// parseTrace returns the rule or policy if the message reports a drop.
func parseTrace(m netlink.Message) (TracedDrop, bool) {
	if m.Header.Type != netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8|traceMessage) || len(m.Data) < 4 {
		return TracedDrop{}, false
	}
	t := TracedDrop{Family: familyText(nftables.TableFamily(m.Data[0]))}
	d, err := netlink.NewAttributeDecoder(m.Data[4:])
	if err != nil {
		return TracedDrop{}, false
	}
	d.ByteOrder = binary.BigEndian
	kind, dropped := uint32(0), false
	policy := uint32(1)
	for d.Next() {
		switch d.Type() {
		case traceTableName:
			t.Table = d.String()
		case traceChain:
			t.Chain = d.String()
		case traceHandle:
			t.Handle = d.Uint64()
		case traceType:
			kind = d.Uint32()
		case tracePolicy:
			policy = d.Uint32()
		case traceVerdict:
			d.Nested(func(n *netlink.AttributeDecoder) error {
				n.ByteOrder = binary.BigEndian
				for n.Next() {
					if n.Type() == verdictCode {
						dropped = n.Uint32() == 0 // NF_DROP
					}
				}
				return nil
			})
		}
	}
	if d.Err() != nil {
		return TracedDrop{}, false
	}
	const kindPolicy, kindRule = 1, 3
	switch kind {
	case kindPolicy:
		t.Handle = 0
		return t, policy == 0
	case kindRule:
		return t, dropped
	}
	return TracedDrop{}, false
}
