package doctor

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"culvert/internal/api"
	"culvert/internal/echo"
)

// RemoteNode is another node, to be probed through the tunnel and on the underlay.
type RemoteNode struct {
	Node   string
	Addr   netip.Addr // its tunnel device's address, in its subnet
	Public netip.Addr // its underlay address
}

func (f RemoteNode) String() string {
	if f.Node == "" {
		return f.Addr.String()
	}
	return f.Node + " " + f.Addr.String()
}

// Limits of probing.
const (
	closedPort   = 33499 // in the range of traceroute: assumed closed
	knockTimeout = 500 * time.Millisecond
	farMost      = 64 // maximum number of probed nodes
	farWorkers   = 16
)

// knock sends a datagram and reports whether it arrived, by the reply.
func knock(ctx context.Context, from, to netip.Addr, port uint16, size int, sum echo.Sum) bool {
	ctx, cancel := context.WithTimeout(ctx, knockTimeout)
	defer cancel()
	_, err := echo.ProbeUDP(ctx, netip.AddrPortFrom(from, 0), netip.AddrPortFrom(to, port), size, sum)
	return err == nil
}

// Offload measures whether packets with checksum offload arrive intact through
// the tunnel, at nodes that answer pings. A device or driver that computes it
// wrongly for encapsulated packets corrupts pods' packets but not pings.
// Datagrams with an offloaded checksum and without one are sent alternately to
// a closed port: a host replies only to intact ones.
//
// from is this node's address in its own subnet, and mtu the pods' MTU in
// bytes.
func Offload(ctx context.Context, from netip.Addr, nodes []RemoteNode, mtu int) Result {
	r := Result{Check: "checksum-offload", Title: "checksums by hardware"}
	var mu sync.Mutex
	well := 0
	each(nodes, func(n RemoteNode) {
		if !n.Addr.Is4() || !from.Is4() { // IPv6 requires a UDP checksum
			return
		}
		for _, size := range []int{64, mtu} {
			damaged, sure := damages(ctx, from, n.Addr, size)
			if !sure {
				return // it answers no datagram: inconclusive
			}
			if damaged {
				mu.Lock()
				defer mu.Unlock()
				r.Findings = append(r.Findings, Finding{Severity: Bad, Warning: api.Warning{
					Check: r.Check,
					Text:  fmt.Sprintf("%s: datagrams of %d bytes arrive without a checksum, but not with one that the hardware computes: it is wrong when they arrive", n, size),
					Fix:   "turn the offload off on the underlay's interface of both nodes, one after the other: `ethtool -K <interface> tx-udp_tnl-segmentation off tx-udp_tnl-csum-segmentation off`, then `ethtool -K <interface> tx off`; or start the daemon with --datapath=userspace",
				}})
				return
			}
		}
		mu.Lock()
		defer mu.Unlock()
		well++
	})
	r.Seen = "not measured"
	if well > 0 {
		r.Seen = fmt.Sprintf("%d nodes receive them intact", well)
	}
	return r
}

// damages compares the two kinds of datagram; it repeats a positive result
// once.
func damages(ctx context.Context, from, to netip.Addr, size int) (damaged, sure bool) {
	for range 2 {
		if knock(ctx, from, to, closedPort, size, echo.Offloaded) {
			return false, true
		}
		if !knock(ctx, from, to, closedPort, size, echo.None) {
			return false, false
		}
	}
	return true, ctx.Err() == nil
}

// PortBlocked reports whether the underlay carries UDP to a node but not to its
// tunnel port: a closed port is answered, the tunnel port is not. A healthy
// tunnel port does not answer either, so the caller must know that the tunnel
// fails.
func PortBlocked(ctx context.Context, from netip.Addr, n RemoteNode, port uint16) bool {
	// The tunnel port answers only if nothing listens on it.
	return knock(ctx, from, n.Public, closedPort, 64, echo.Offloaded) && !knock(ctx, from, n.Public, port, 64, echo.Offloaded)
}

// PortClosed reports whether a node answers that its tunnel port is closed.
func PortClosed(ctx context.Context, from netip.Addr, n RemoteNode, port uint16) bool {
	ctx, cancel := context.WithTimeout(ctx, knockTimeout)
	defer cancel()
	_, err := echo.ProbeUDP(ctx, netip.AddrPortFrom(from, 0), netip.AddrPortFrom(n.Public, port), 64, echo.Offloaded)
	return err == nil && !errors.Is(ctx.Err(), context.DeadlineExceeded)
}

// each calls fn for up to farMost nodes, farWorkers at a time.
func each(nodes []RemoteNode, fn func(RemoteNode)) {
	var group sync.WaitGroup
	tokens := make(chan struct{}, farWorkers)
	for _, n := range nodes[:min(len(nodes), farMost)] {
		tokens <- struct{}{}
		group.Go(func() {
			defer func() { <-tokens }()
			fn(n)
		})
	}
	group.Wait()
}
