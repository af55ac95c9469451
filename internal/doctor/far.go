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

// Far is another node, as it is probed through the tunnel and on the underlay.
type Far struct {
	Node   string
	Addr   netip.Addr // in its subnet: that of its tunnel device
	Public netip.Addr // on the underlay
}

func (f Far) String() string {
	if f.Node == "" {
		return f.Addr.String()
	}
	return f.Node + " " + f.Addr.String()
}

// Probing bounds what is sent.
const (
	closedPort    = 33499 // of the range that traceroute uses: nobody listens there
	knockPatience = 500 * time.Millisecond
	farMost       = 64 // nodes that are probed so
	farWorkers    = 16
)

// knock sends one datagram and says whether it arrived.
func knock(ctx context.Context, from, to netip.Addr, port uint16, size int, sum echo.Sum) bool {
	ctx, cancel := context.WithTimeout(ctx, knockPatience)
	defer cancel()
	_, err := echo.Knock(ctx, netip.AddrPortFrom(from, 0), netip.AddrPortFrom(to, port), size, sum)
	return err == nil
}

// Offload measures whether packets whose checksum the hardware fills in arrive
// whole through the tunnel, at nodes that answer to pings: a device, or a driver, that
// does it wrong for encapsulated packets damages what pods send and leaves pings
// alone. A datagram with such a checksum and one with none are sent by turns to a
// port where nobody listens: a host answers only to what is whole.
//
// from is this node's address in its own subnet, and mtu what pods may send.
func Offload(ctx context.Context, from netip.Addr, nodes []Far, mtu int) Result {
	r := Result{Check: "checksum-offload", Title: "checksums by hardware"}
	var mu sync.Mutex
	well := 0
	each(nodes, func(n Far) {
		if !n.Addr.Is4() || !from.Is4() { // IPv6 knows no datagram without a checksum
			return
		}
		for _, size := range []int{64, mtu} {
			damaged, sure := damages(ctx, from, n.Addr, size)
			if !sure {
				return // it answers to no datagram: nothing can be said
			}
			if damaged {
				mu.Lock()
				defer mu.Unlock()
				r.Findings = append(r.Findings, Finding{Severity: Bad, Warning: api.Warning{
					Check: r.Check,
					Text:  fmt.Sprintf("%s: datagrams of %d bytes arrive without a checksum, and do not with one that is left to the hardware: it is filled in wrong on the way", n, size),
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
		r.Seen = fmt.Sprintf("%d nodes get them whole", well)
	}
	return r
}

// damages compares the two ways, twice where they differ.
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

// PortEaten says whether the underlay carries UDP to a node, but not to the
// tunnel's port there: another port is answered to, the tunnel's is not, and the
// tunnel does not answer either.
func PortEaten(ctx context.Context, from netip.Addr, n Far, port uint16) bool {
	// The tunnel's own port answers only where nobody has it.
	return knock(ctx, from, n.Public, closedPort, 64, echo.Offloaded) && !knock(ctx, from, n.Public, port, 64, echo.Offloaded)
}

// NobodyListens says whether a node answers that nobody has the tunnel's port.
func NobodyListens(ctx context.Context, from netip.Addr, n Far, port uint16) bool {
	ctx, cancel := context.WithTimeout(ctx, knockPatience)
	defer cancel()
	_, err := echo.Knock(ctx, netip.AddrPortFrom(from, 0), netip.AddrPortFrom(n.Public, port), 64, echo.Offloaded)
	return err == nil && !errors.Is(ctx.Err(), context.DeadlineExceeded)
}

// each calls fn with a bounded number of nodes, some at a time.
func each(nodes []Far, fn func(Far)) {
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
