package trace

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"culvert/internal/echo"
	"culvert/internal/firewall"
	"culvert/internal/host"
)

// Probe is a real packet that was sent from the pod, and its outcome.
type Probe struct {
	What     string        `json:"what"`
	Answered bool          `json:"answered"`
	Took     time.Duration `json:"-"`
	// TookSeconds is Took.
	TookSeconds float64    `json:"took_seconds,omitempty"`
	Said        string     `json:"said,omitempty"` // the reply if it was not answered
	By          netip.Addr `json:"by,omitzero"`    // the sender of an ICMP error
	// Largest is the largest packet that passes, up to Want; 0 if not measured.
	Largest int `json:"largest,omitempty"`
	Want    int `json:"want,omitempty"`
	// Dropped are this host's rules that dropped it, from nftables' trace.
	Dropped []firewall.TracedDrop `json:"dropped,omitempty"`
	// Limit is why Dropped is not known; empty if it is.
	Limit string `json:"limit,omitempty"`
	// Sent and Received are the increases of the tunnel device's packet
	// counters.
	Sent     uint64 `json:"tunnel_sent"`
	Received uint64 `json:"tunnel_received"`
	// Reasons counts packets that the kernel dropped meanwhile, on the whole
	// machine, by its reason and the place; nil if it does not report any.
	Reasons map[string]int `json:"kernel_drops,omitempty"`
}

// replyTimeout bounds the wait for a reply.
const replyTimeout = 500 * time.Millisecond

// Send sends real packets from the pod, or from this host's own address, and
// traces the first through this host's rules.
func Send(ctx context.Context, p Path) (Probe, error) {
	var probe Probe
	ns := ""
	if p.Pod != nil {
		ns = p.Pod.Netns
	}
	follow, err := firewall.TracePackets(p.Local, p.Remote, p.Proto)
	if err != nil { // continue without tracing
		probe.Limit = err.Error()
	}
	drops := watchDrops()
	before := host.DeviceTraffic(p.Tunnel)
	probe.What, probe.Took, err = send(ctx, ns, p)
	probe.TookSeconds = probe.Took.Seconds()
	after := host.DeviceTraffic(p.Tunnel)
	if drops != nil {
		probe.Reasons = drops()
	}
	if follow != nil {
		probe.Dropped = follow()
	}
	probe.Sent, probe.Received = after.SentPackets-before.SentPackets, after.ReceivedPackets-before.ReceivedPackets
	var refused echo.Refused
	switch {
	case err == nil:
		probe.Answered = true
	case errors.As(err, &refused):
		probe.Said, probe.By = refused.Error(), refused.By
	default:
		probe.Said = err.Error()
	}
	if !probe.Answered || p.Pod == nil {
		return probe, nil
	}
	probe.Want = p.Pod.MTU
	err = within(ns, func() error {
		e, err := echo.Open(p.Local)
		if err != nil {
			return err
		}
		defer e.Close()
		low := 576
		if !p.Local.Is4() {
			low = 1280
		}
		if _, err := e.Series(ctx, p.Remote, 1, 0, 0, replyTimeout); err != nil { // it answers no ping: not measured
			probe.Want = 0
			return nil
		}
		probe.Largest, _ = e.PathMTU(ctx, p.Remote, min(low, probe.Want), probe.Want, replyTimeout/3)
		return nil
	})
	return probe, err
}

// send sends one packet, and a second if the first is not answered: the first
// may be delayed by neighbour resolution.
func send(ctx context.Context, ns string, p Path) (what string, took time.Duration, err error) {
	once := func() error {
		ctx, cancel := context.WithTimeout(ctx, replyTimeout)
		defer cancel()
		return within(ns, func() error {
			began := time.Now()
			defer func() { took = time.Since(began) }()
			switch p.Proto {
			case unix.IPPROTO_TCP:
				what = fmt.Sprintf("TCP connection to %s", netip.AddrPortFrom(p.Remote, p.Port))
				d := net.Dialer{LocalAddr: &net.TCPAddr{IP: p.Local.AsSlice()}}
				c, err := d.DialContext(ctx, "tcp", netip.AddrPortFrom(p.Remote, p.Port).String())
				switch {
				case err == nil:
					return c.Close()
				case errors.Is(err, unix.ECONNREFUSED): // it arrived
					what += ", refused by the far end (nothing listens, or a rule rejects it)"
					return nil
				case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
					return echo.ErrTimeout
				}
				return err
			case unix.IPPROTO_UDP:
				what = fmt.Sprintf("UDP datagram to %s", netip.AddrPortFrom(p.Remote, p.Port))
				_, err := echo.ProbeUDP(ctx, netip.AddrPortFrom(p.Local, 0), netip.AddrPortFrom(p.Remote, p.Port), 64, echo.Offloaded)
				return err
			}
			what = fmt.Sprintf("echo request to %s", p.Remote)
			e, err := echo.Open(p.Local)
			if err != nil {
				return err
			}
			defer e.Close()
			took, err = e.Ping(ctx, p.Remote, 84)
			return err
		})
	}
	if err = once(); errors.Is(err, echo.ErrTimeout) {
		err = once()
	}
	return what, took, err
}

// within calls fn on a thread in a network namespace; "" is the current one.
func within(path string, fn func() error) error {
	if path == "" {
		return fn()
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		ns, err := netns.GetFromPath(path)
		if err == nil {
			err = netns.Set(ns)
			_ = ns.Close()
		}
		if err == nil {
			err = fn()
		}
		done <- err
	}()
	return <-done
}

// Deduce probes the far node to find where packets end, for use if that node
// cannot be asked:
//
//	this node ── underlay ── UDP port ── tunnel device ── far host ── far pod
func Deduce(ctx context.Context, p Path) Step {
	far := p.Peer.Node
	if far == "" {
		far = p.Peer.Public.String()
	}
	s := Step{Node: far, Layer: LayerFar, State: Bad, Fix: "run the same `culvert trace` on " + far + ", or let this one do it (--far)"}
	answers := func(from, to netip.Addr) error {
		ctx, cancel := context.WithTimeout(ctx, 2*replyTimeout)
		defer cancel()
		e, err := echo.Open(from)
		if err != nil {
			return err
		}
		defer e.Close()
		sum, err := e.Series(ctx, to, 2, 0, 50*time.Millisecond, replyTimeout/2)
		if sum.Answered > 0 {
			return nil
		}
		if err == nil {
			err = sum.Err
		}
		return err
	}
	knock := func(port uint16) error {
		ctx, cancel := context.WithTimeout(ctx, replyTimeout)
		defer cancel()
		_, err := echo.ProbeUDP(ctx, netip.AddrPortFrom(p.Public, 0), netip.AddrPortFrom(p.Peer.Public, port), 64, echo.Offloaded)
		return err
	}
	own := p.Public
	if p.Format != "host-gw" {
		own = p.Subnet.Masked().Addr()
	}
	tunnel := p.Peer.Subnet.Masked().Addr()
	if p.Format == "host-gw" {
		tunnel = p.Peer.Public
	}
	err := answers(own, tunnel)
	var refused echo.Refused
	switch {
	case err == nil:
		gateway := tunnel.Next()
		if p.Format != "host-gw" && answers(own, gateway) != nil {
			s.Detail = fmt.Sprintf("its tunnel device answers, but the pods' gateway %s does not: the node has no bridge with that address, or no pod was ever added there", gateway)
			return s
		}
		s.Detail = fmt.Sprintf("the node answers through the tunnel, but the pod %s does not: it does not exist, or that node's forwarding, a rule, its bridge or the pod's own route stops the packets", p.Remote)
		return s
	case errors.As(err, &refused) && refused.By != p.Local:
		s.Detail = fmt.Sprintf("%s answers with an error: %v", refused.By, refused)
		return s
	}
	switch reached := answers(p.Public, p.Peer.Public); {
	case reached != nil:
		s.Layer = LayerUnderlay
		s.Detail = fmt.Sprintf("%s does not answer on the underlay either (%v): the node is down, or the underlay does not carry packets between %s and it", p.Peer.Public, reached, p.Public)
		s.Fix = "check that the node runs, and the network between the nodes"
	case p.Format == "vxlan" && knock(p.TunnelPort) == nil:
		s.Layer = LayerTunnel
		s.Detail = fmt.Sprintf("it answers that UDP port %d is not open: there is no tunnel device, and no daemon forwards packets", p.TunnelPort)
		s.Fix = "start culvert on " + far
	case p.Format == "vxlan" && knock(33499) == nil:
		s.Layer = LayerTunnelRules
		s.Detail = fmt.Sprintf("it answers on another UDP port but not on the tunnel's port %d: a rule there or a firewall on the path drops the tunnel's packets, or that node does not have this one as a peer", p.TunnelPort)
	default:
		s.Detail = "it answers on the underlay but not through the tunnel: a rule there or a firewall on the path drops the tunnel's packets, or no daemon runs there"
	}
	return s
}
