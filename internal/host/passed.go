package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Passed says whether packets have passed between this node and a peer since the
// last look.
type Passed struct {
	Source
	Sent, Received bool
}

// PassedWatch looks at what the kernel's vxlan devices have sent to peers, by the
// age of their FDB entries, and have been let take, by the counters of the elements
// of the peers' sets. It looks at the latter only if something was sent: on a node
// with 5,000 peers a look takes some milliseconds.
//
// The kernel does not say whom its ipip device sends to.
type PassedWatch struct {
	route, nft *netlink.Conn
	used       map[netip.Addr]time.Time // when the FDB entry of an underlay address was used last
	counted    map[Source]uint64        // packets from a peer at the last look
}

// WatchPassed opens its sockets in the network namespace of the calling thread.
func WatchPassed() (*PassedWatch, error) {
	route, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return nil, fmt.Errorf("looking at what has passed: %w", err)
	}
	nft, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("looking at what has passed: %w", err), route.Close())
	}
	return &PassedWatch{route: route, nft: nft}, nil
}

// Close closes the sockets.
func (w *PassedWatch) Close() error { return errors.Join(w.route.Close(), w.nft.Close()) }

// Look returns what has passed with each peer of the tunnels whose device is a
// vxlan one. Where nothing was sent to anybody but this process's own requests, to
// the underlay addresses in own, and nobody waits for an answer, what came is not
// looked at.
func (w *PassedWatch) Look(tunnels []Tunnel, own map[netip.Addr]bool, waiting bool) ([]Passed, error) {
	used, err := w.lastUsed(tunnels)
	if err != nil {
		return nil, err
	}
	sent := make(map[netip.Addr]bool)
	for a, at := range used {
		// An entry that is new has the time of its making.
		before, known := w.used[a]
		if known && at.Sub(before) > 200*time.Millisecond {
			if !own[a] {
				sent[a] = true
			}
			continue
		}
		if known {
			used[a] = before // the kernel's clock is coarse
		}
	}
	w.used = used
	if len(sent) == 0 && !waiting {
		return nil, nil
	}
	counts, err := w.counts(tunnels)
	if err != nil {
		return nil, err
	}
	var all []Passed
	for _, t := range tunnels {
		for _, s := range t.Peers {
			n, counts := counts[s]
			if !counts {
				continue // its set was made without counters
			}
			_, device := used[s.Outer]
			if !device {
				continue
			}
			before := w.counted[s]
			all = append(all, Passed{Source: s, Sent: sent[s.Outer], Received: n > before || n < before && n > 0})
		}
	}
	w.counted = counts
	return all, nil
}

// lastUsed reads the FDBs: when each underlay address was sent to last.
func (w *PassedWatch) lastUsed(tunnels []Tunnel) (map[netip.Addr]time.Time, error) {
	all := make(map[netip.Addr]time.Time)
	for _, t := range tunnels {
		if t.Device == "" || t.Port == 0 {
			continue
		}
		index, err := linkIndex(w.route, t.Device)
		if err != nil {
			return nil, err
		}
		head := make([]byte, unix.SizeofNdMsg)
		head[0] = unix.AF_BRIDGE
		binary.NativeEndian.PutUint32(head[4:], index)
		messages, err := w.route.Execute(netlink.Message{
			Header: netlink.Header{Type: unix.RTM_GETNEIGH, Flags: netlink.Request | netlink.Dump}, Data: head,
		})
		if err != nil {
			return nil, fmt.Errorf("listing the FDB of %s: %w", t.Device, err)
		}
		now := time.Now()
		for _, m := range messages {
			if len(m.Data) < unix.SizeofNdMsg || binary.NativeEndian.Uint32(m.Data[4:]) != index {
				continue
			}
			var to netip.Addr
			age := time.Duration(-1)
			d, err := netlink.NewAttributeDecoder(m.Data[unix.SizeofNdMsg:])
			if err != nil {
				return nil, fmt.Errorf("listing the FDB of %s: %w", t.Device, err)
			}
			for d.Next() {
				switch d.Type() {
				case unix.NDA_DST:
					to, _ = netip.AddrFromSlice(d.Bytes())
				case unix.NDA_CACHEINFO: // struct nda_cacheinfo, in ticks of USER_HZ
					if b := d.Bytes(); len(b) >= 8 {
						age = time.Duration(binary.NativeEndian.Uint32(b[4:])) * (time.Second / 100)
					}
				}
			}
			if at := now.Add(-age); to.IsValid() && age >= 0 && at.After(all[to.Unmap()]) {
				all[to.Unmap()] = at
			}
		}
	}
	return all, nil
}

// linkIndex asks for a link by its name.
func linkIndex(c *netlink.Conn, name string) (uint32, error) {
	e := netlink.NewAttributeEncoder()
	e.String(unix.IFLA_IFNAME, name)
	attrs, err := e.Encode()
	if err != nil {
		return 0, err
	}
	messages, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETLINK, Flags: netlink.Request}, Data: append(make([]byte, unix.SizeofIfInfomsg), attrs...),
	})
	if err != nil || len(messages) == 0 || len(messages[0].Data) < unix.SizeofIfInfomsg {
		return 0, fmt.Errorf("looking for the device %s: %w", name, err)
	}
	return binary.NativeEndian.Uint32(messages[0].Data[4:]), nil
}

// Count is what came from a peer.
type Count struct{ Packets, Bytes uint64 }

// ReceivedFrom returns what the kernel's tunnel devices have been let take from
// each peer since its set was made: bytes of inner packets, and packets as the
// input hook sees them, which may have been joined before.
func ReceivedFrom(tunnels []Tunnel) (map[Source]Count, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, err
	}
	all := make(map[Source]Count)
	err = eachCount(c, tunnels, func(t Tunnel, s Source, packets, bytes uint64) {
		all[s] = Count{packets, bytes - min(bytes, packets*t.outerLen())}
	})
	return all, errors.Join(err, c.Close())
}

// outerLen is what stands before the inner packet, as the input hook sees it.
func (t Tunnel) outerLen() uint64 {
	n := uint64(20)
	if !t.is4() {
		n = 40
	}
	if t.Port != 0 {
		n += 8 + 8 + 14
	}
	return n
}

// counts reads how many packets have come from each peer.
func (w *PassedWatch) counts(tunnels []Tunnel) (map[Source]uint64, error) {
	all := make(map[Source]uint64)
	return all, eachCount(w.nft, tunnels, func(_ Tunnel, s Source, packets, _ uint64) { all[s] = packets })
}

func eachCount(c *netlink.Conn, tunnels []Tunnel, see func(t Tunnel, s Source, packets, bytes uint64)) error {
	for _, t := range tunnels {
		if t.Device == "" {
			continue
		}
		for _, s := range t.sets() {
			elements, err := setElementsBy(c, nftables.TableFamilyINet, TableName, s.name)
			if err != nil {
				return fmt.Errorf("reading the counters of the nftables set %s: %w", s.name, err)
			}
			for _, e := range elements {
				if source, ok := sourceOf(e, s.bits); ok && e.Counter != nil {
					see(t, source, e.Counter.Packets, e.Counter.Bytes)
				}
			}
		}
	}
	return nil
}
