package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/firewall"
)

// PeerActivity reports whether packets have passed between this node and a peer since the
// last Read.
type PeerActivity struct {
	firewall.Source
	Sent, Received bool
}

// PeerWatch observes the traffic of the kernel's vxlan devices per peer: sent
// packets by the last use of FDB entries, accepted ones by the counters of the
// peers' set elements. It reads the counters only if needed (see Read): with
// 5,000 peers that takes some milliseconds.
//
// The kernel does not report the destinations of its ipip device.
type PeerWatch struct {
	route    *netlink.Conn
	counters firewall.PeerCounters
	used     map[netip.Addr]time.Time           // last use of an underlay address's FDB entry
	counted  map[firewall.Source]firewall.Count // received from a peer, at the last Read
}

// WatchPeers opens its sockets in the network namespace of the calling thread.
func WatchPeers() (*PeerWatch, error) {
	route, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return nil, fmt.Errorf("looking at what has passed: %w", err)
	}
	counters, err := firewall.OpenPeerCounters()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("looking at what has passed: %w", err), route.Close())
	}
	return &PeerWatch{route: route, counters: counters}, nil
}

func (w *PeerWatch) Close() error { return errors.Join(w.route.Close(), w.counters.Close()) }

// Read returns what has passed with each peer of the vxlan tunnels. own are the
// underlay addresses to which only this process's own requests were sent. If
// nothing was sent to others and the caller is not waiting for a reply, Read
// skips the counters and returns nil.
func (w *PeerWatch) Read(tunnels []firewall.TunnelRule, own map[netip.Addr]bool, waiting bool) ([]PeerActivity, error) {
	used, err := w.lastUsed(tunnels)
	if err != nil {
		return nil, err
	}
	sent := make(map[netip.Addr]bool)
	for a, at := range used {
		// A new entry has its creation time.
		before, known := w.used[a]
		if known && at.Sub(before) > 200*time.Millisecond {
			if !own[a] {
				sent[a] = true
			}
			continue
		}
		if known {
			used[a] = before // ignore the coarse clock's jitter
		}
	}
	w.used = used
	if len(sent) == 0 && !waiting {
		return nil, nil
	}
	counts, err := w.counters.Received(tunnels)
	if err != nil {
		return nil, err
	}
	var all []PeerActivity
	for _, t := range tunnels {
		for _, s := range t.Peers {
			n, counts := counts[s]
			if !counts {
				continue // the set was created without counters
			}
			_, device := used[s.Outer]
			if !device {
				continue
			}
			before := w.counted[s].Packets
			all = append(all, PeerActivity{Source: s, Sent: sent[s.Outer], Received: n.Packets > before || n.Packets < before && n.Packets > 0})
		}
	}
	w.counted = counts
	return all, nil
}

// lastUsed reads from the FDBs when a packet was last sent to each underlay
// address.
func (w *PeerWatch) lastUsed(tunnels []firewall.TunnelRule) (map[netip.Addr]time.Time, error) {
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
		messages, err := dump(w.route, netlink.Message{Header: netlink.Header{Type: unix.RTM_GETNEIGH}, Data: head})
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

// linkIndex looks up a link by name.
func linkIndex(c executor, name string) (uint32, error) {
	e := netlink.NewAttributeEncoder()
	e.String(unix.IFLA_IFNAME, name)
	attrs, err := e.Encode()
	if err != nil {
		return 0, err
	}
	messages, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETLINK, Flags: netlink.Request}, Data: append(make([]byte, unix.SizeofIfInfomsg), attrs...),
	})
	if err == nil && (len(messages) == 0 || len(messages[0].Data) < unix.SizeofIfInfomsg) {
		err = errors.New("the kernel's answer is empty")
	}
	if err != nil {
		return 0, fmt.Errorf("looking for the device %s: %w", name, err)
	}
	return binary.NativeEndian.Uint32(messages[0].Data[4:]), nil
}
