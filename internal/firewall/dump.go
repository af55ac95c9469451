package firewall

import (
	"encoding/binary"
	"iter"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/names"
)

// nfDump dumps nftables objects that google/nftables does not decode
// completely: verdicts of maps, and devices of ingress hooks.
func nfDump(kind uint16, family nftables.TableFamily, names map[uint16]string) ([]netlink.Message, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	return nfDumpBy(c, kind, family, names)
}

// nfDumpBy is nfDump on an open socket.
func nfDumpBy(c *netlink.Conn, kind uint16, family nftables.TableFamily, names map[uint16]string) ([]netlink.Message, error) {
	e := netlink.NewAttributeEncoder()
	for attr, name := range names {
		e.String(attr, name)
	}
	attrs, err := e.Encode()
	if err != nil {
		return nil, err
	}
	return c.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | kind), Flags: netlink.Request | netlink.Dump},
		Data:   append([]byte{byte(family), unix.NFNETLINK_V0, 0, 0}, attrs...),
	})
}

// nfAttrs decodes the attributes of a message or of a nested attribute.
func nfAttrs(b []byte, each func(d *netlink.AttributeDecoder)) error {
	d, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return err
	}
	d.ByteOrder = binary.BigEndian
	for d.Next() {
		each(d)
	}
	return d.Err()
}

// nfNested decodes the attributes nested in the current one.
func nfNested(d *netlink.AttributeDecoder, each func(d *netlink.AttributeDecoder)) {
	d.Do(func(b []byte) error { return nfAttrs(b, each) })
}

// setElements dumps a set's elements with verdicts.
func setElements(c *netlink.Conn, family nftables.TableFamily, table, set string) ([]nftables.SetElement, error) {
	messages, err := nfDumpBy(c, unix.NFT_MSG_GETSETELEM, family, map[uint16]string{unix.NFTA_SET_ELEM_LIST_TABLE: table, unix.NFTA_SET_ELEM_LIST_SET: set})
	if err != nil {
		return nil, err
	}
	var all []nftables.SetElement
	for _, m := range messages {
		if len(m.Data) < 4 {
			continue
		}
		if err := nfAttrs(m.Data[4:], func(d *netlink.AttributeDecoder) {
			if d.Type() != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				return
			}
			nfNested(d, func(d *netlink.AttributeDecoder) {
				var e nftables.SetElement
				nfNested(d, func(d *netlink.AttributeDecoder) { decodeSetElement(d, &e) })
				all = append(all, e)
			})
		}); err != nil {
			return nil, err
		}
	}
	return all, nil
}

func decodeSetElement(d *netlink.AttributeDecoder, e *nftables.SetElement) {
	const keyEnd = 10 // NFTA_SET_ELEM_KEY_END
	value := func(to *[]byte) {
		nfNested(d, func(d *netlink.AttributeDecoder) {
			switch d.Type() {
			case unix.NFTA_DATA_VALUE:
				*to = slices.Clone(d.Bytes())
			case unix.NFTA_DATA_VERDICT:
				v := &expr.Verdict{}
				nfNested(d, func(d *netlink.AttributeDecoder) {
					switch d.Type() {
					case unix.NFTA_VERDICT_CODE:
						v.Kind = expr.VerdictKind(int32(d.Uint32()))
					case unix.NFTA_VERDICT_CHAIN:
						v.Chain = d.String()
					}
				})
				e.VerdictData = v
			}
		})
	}
	switch d.Type() {
	case unix.NFTA_SET_ELEM_KEY:
		value(&e.Key)
	case keyEnd:
		value(&e.KeyEnd)
	case unix.NFTA_SET_ELEM_DATA:
		value(&e.Val)
	case unix.NFTA_SET_ELEM_FLAGS:
		e.IntervalEnd = d.Uint32()&unix.NFT_SET_ELEM_INTERVAL_END != 0
	}
}

// eachCounter calls each for the elements with counters of a set in culvert's table. key is
// valid during the call. A set has an element per peer, so nothing is allocated for one.
func eachCounter(c *netlink.Conn, set string, each func(key []byte, n Count)) error {
	messages, err := nfDumpBy(c, unix.NFT_MSG_GETSETELEM, nftables.TableFamilyINet,
		map[uint16]string{unix.NFTA_SET_ELEM_LIST_TABLE: names.Table, unix.NFTA_SET_ELEM_LIST_SET: set})
	if err != nil {
		return err
	}
	for _, m := range messages {
		if len(m.Data) < 4 {
			continue
		}
		for _, element := range attributes(find(m.Data[4:], unix.NFTA_SET_ELEM_LIST_ELEMENTS)) {
			counter := find(find(element, unix.NFTA_SET_ELEM_EXPR), unix.NFTA_EXPR_DATA)
			packets, bytes := find(counter, unix.NFTA_COUNTER_PACKETS), find(counter, unix.NFTA_COUNTER_BYTES)
			if len(packets) == 8 && len(bytes) == 8 {
				each(find(find(element, unix.NFTA_SET_ELEM_KEY), unix.NFTA_DATA_VALUE), Count{binary.BigEndian.Uint64(packets), binary.BigEndian.Uint64(bytes)})
			}
		}
	}
	return nil
}

// attributes iterates over the netlink attributes in b: types without flags, and values.
func attributes(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= unix.SizeofNlAttr {
			n := int(binary.NativeEndian.Uint16(b))
			if n < unix.SizeofNlAttr || n > len(b) || !yield(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofNlAttr:n]) {
				return
			}
			b = b[min(len(b), (n+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1)):]
		}
	}
}

// find returns the value of the first attribute of a type in b; nil if there is none.
func find(b []byte, kind uint16) []byte {
	for k, value := range attributes(b) {
		if k == kind {
			return value
		}
	}
	return nil
}

// hookLinks returns the devices of chains at ingress hooks, by table and chain.
func hookLinks(family nftables.TableFamily) (map[[2]string][]string, error) {
	messages, err := nfDump(unix.NFT_MSG_GETCHAIN, family, nil)
	if err != nil {
		return nil, err
	}
	const hookDevs = 4 // NFTA_HOOK_DEVS
	all := make(map[[2]string][]string)
	for _, m := range messages {
		if len(m.Data) < 4 {
			continue
		}
		var key [2]string
		var links []string
		add := func(name string) { links = append(links, strings.TrimRight(name, "\x00")) }
		if err := nfAttrs(m.Data[4:], func(d *netlink.AttributeDecoder) {
			switch d.Type() {
			case unix.NFTA_CHAIN_TABLE:
				key[0] = d.String()
			case unix.NFTA_CHAIN_NAME:
				key[1] = d.String()
			case unix.NFTA_CHAIN_HOOK:
				nfNested(d, func(d *netlink.AttributeDecoder) {
					switch d.Type() {
					case unix.NFTA_HOOK_DEV:
						add(d.String())
					case hookDevs:
						nfNested(d, func(d *netlink.AttributeDecoder) { add(d.String()) })
					}
				})
			}
		}); err != nil {
			return nil, err
		}
		all[key] = links
	}
	return all, nil
}
