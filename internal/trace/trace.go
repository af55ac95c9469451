// Package trace explains where packets between a pod of this node and another
// address of the cluster network go, and what stops them. Read collects the
// facts of one node in a Path; Explain does no I/O. The same explanation serves
// both ends: the node of the sending pod, and that of the receiving one. It
// keeps no state; Send, which sends real packets, adds a temporary nftables
// table (firewall.TracePackets).
//
//	pod ── veth ── bridge ── route ── rules ── neighbour, FDB ── tunnel ── rules ── underlay
package trace

import (
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"culvert/internal/firewall"
	"culvert/internal/host"
	"culvert/internal/names"
)

// State is the effect of a step on packets.
type State string

const (
	// OK means that packets pass.
	OK State = "ok"
	// Bad means that packets are stopped.
	Bad State = "BAD"
	// Unsure means that packets may be stopped, or that the step could not be
	// read.
	Unsure State = "?"
)

// Step is one place on the path, on one node.
type Step struct {
	Node   string `json:"node"`
	Layer  string `json:"layer"` // such as "pod route", "rules", "FDB"
	State  State  `json:"state"`
	Detail string `json:"detail"`
	Fix    string `json:"fix,omitempty"`
}

func (s Step) String() string { return fmt.Sprintf("%s, %s: %s", s.Node, s.Layer, s.Detail) }

// The layers of a path.
const (
	LayerLease        = "lease"
	LayerPod          = "pod"
	LayerPodRoute     = "pod route"
	LayerBridge       = "bridge"
	LayerSetting      = "sysctl"
	LayerRoute        = "route"
	LayerRules        = "rules"
	LayerNeighbour    = "neighbour"
	LayerFDB          = "FDB"
	LayerTunnel       = "tunnel"
	LayerFastPath     = "fast path"
	LayerTunnelRules  = "tunnel rules"
	LayerUnderlay     = "underlay route"
	LayerMTU          = "MTU"
	LayerProbe        = "probe"
	LayerFar          = "far node"
	LayerReverseRules = "rules, way back"
)

// Route is the kernel's route to an address.
type Route struct {
	Err  error // why there is none
	Link string
	Via  netip.Addr
	MTU  int // of the route, if smaller than the link's
	// Next is the Ethernet address of the next hop, NextState "failed" if it
	// could not be resolved.
	Next, NextState string
}

func (r Route) String() string {
	if r.Err != nil {
		return r.Err.Error()
	}
	s := "dev " + r.Link
	if r.Via.IsValid() {
		s = "via " + r.Via.String() + " " + s
	}
	return s
}

// Pod is the pod's end of the path.
type Pod struct {
	Netns string // path of its network namespace
	Link  string // its interface
	Up    bool
	MTU   int
	Out   Route // to the remote address
	// The host end of the veth pair, and its bridge.
	Veth     string
	VethUp   bool
	Bridge   string // "" if none
	BridgeUp bool
	Gateway  netip.Addr // next hop of the pod's route
	HasGW    bool       // this node has the gateway's address
	Blocked  bool       // the bridge port is not forwarding
}

// Peer is the node with the lease of the remote address.
type Peer struct {
	Node   string
	Subnet netip.Prefix
	Public netip.Addr
	MAC    string // of its VTEP
	VTEP   netip.Addr
	VNI    uint32
}

// Path has the facts from a node's kernel and the leases about the path between
// a pod of this node and a remote address.
type Path struct {
	Node          string
	Local, Remote netip.Addr
	Proto         byte
	Port          uint16
	// Toward is set if the traced packets go from Local to Remote; otherwise
	// they come from Remote, and Local answers.
	Toward bool

	Pod  *Pod // nil if no namespace of this host has Local
	Self bool // Local is the node's own address

	Format, Kind string // of the datapath, such as vxlan and kernel
	Subnet       netip.Prefix
	Public       netip.Addr // this node's
	Peer         *Peer      // nil if Remote is in no peer's lease
	NoPeer       string     // why Peer is nil

	Settings []Setting
	Out      Route // from Local to Remote, as input from the bridge
	In       Route // to Local
	WantLink string
	WantVia  netip.Addr

	Neighbour string // Ethernet address of the peer's VTEP on the tunnel device
	FDB       string // underlay address of the peer's VTEP on the tunnel device

	Tunnel      string // the tunnel device
	TunnelUp    bool
	TunnelThere bool
	TunnelMTU   int
	TunnelLocal netip.Addr // outer source
	TunnelPort  uint16
	Underlay    Route // to the peer's public address
	UnderlayMTU int

	// FastPath is set if the daemon's eBPF fast path is on, and ShortWay if flows of pods
	// may bypass the host; NoShortWay says why not, where they were to.
	FastPath   bool
	ShortWay   bool
	NoShortWay string

	Blocks []host.IPsecBlock // IPsec policies that drop the packets
	Rules  []RuleStep
	Limit  []string // what could not be read
}

// Setting is a kernel setting that affects the path.
type Setting struct {
	Key, Value, Want string
	Why              string
}

// RuleStep is the verdicts of the chains at one hook on one kind of packet.
type RuleStep struct {
	Layer    string
	Hook     firewall.Hook
	Packet   firewall.Packet
	Verdicts []firewall.Verdict
}

// Explain returns a step for each place on the path. It does no I/O. The
// direction toward the remote address comes first, then the way back.
func Explain(p Path) []Step {
	e := explainer{Path: p}
	e.lease()
	if !p.Self {
		e.pod()
	}
	e.settings()
	e.device()
	e.route()
	for _, b := range e.Blocks {
		e.add(LayerRules, Bad, b.Fix(), "%s drops packets between %s and %s", b, e.Local, e.Remote)
	}
	for _, r := range p.Rules {
		if r.Layer == LayerRules {
			e.rules(r)
		}
	}
	e.tunnel()
	e.fastPath()
	for _, r := range p.Rules {
		if r.Layer != LayerRules {
			e.rules(r)
		}
	}
	e.underlay()
	e.mtu()
	for _, l := range p.Limit {
		e.add(LayerProbe, Unsure, "", "%s", l)
	}
	return e.steps
}

type explainer struct {
	Path
	steps []Step
}

func (e *explainer) add(layer string, state State, fix, format string, args ...any) {
	e.steps = append(e.steps, Step{Node: e.Node, Layer: layer, State: state, Detail: fmt.Sprintf(format, args...), Fix: fix})
}

func (e *explainer) lease() {
	switch {
	case e.Peer == nil && e.NoPeer == "": // Remote is a pod of this node too
		return
	case e.Peer == nil:
		e.add(LayerLease, Bad, "see `culvert lease list`, and `culvert lease check`", "no lease covers %s: %s", e.Remote, e.NoPeer)
	default:
		e.add(LayerLease, OK, "", "%s is in %s of %s at %s", e.Remote, e.Peer.Subnet, e.Peer.Node, e.Peer.Public)
	}
}

func (e *explainer) pod() {
	p := e.Pod
	if p == nil {
		e.add(LayerPod, Bad, "check that the pod runs, and on this node", "no network namespace on this host has the address %s, which is in this node's subnet %s", e.Local, e.Subnet)
		return
	}
	if !p.Up {
		e.add(LayerPod, Bad, "ip link set "+p.Link+" up, in the pod", "%s of the pod %s is down", p.Link, e.Local)
		return
	}
	e.add(LayerPod, OK, "", "%s in %s, %s, MTU %d", e.Local, p.Netns, p.Link, p.MTU)
	if p.Out.Err != nil {
		e.add(LayerPodRoute, Bad, fmt.Sprintf("ip route add default via %s, in the pod; or recreate the pod", e.gatewayWanted()), "the pod %s has no route to %s: %v", e.Local, e.Remote, p.Out.Err)
	} else {
		e.add(LayerPodRoute, OK, "", "%s %s", e.Remote, p.Out)
	}
	switch {
	case p.Veth == "":
		e.add(LayerBridge, Unsure, "", "the host's end of %s was not found: it is not a veth pair", p.Link)
	case !p.VethUp:
		e.add(LayerBridge, Bad, "ip link set "+p.Veth+" up", "%s, the host's end of the pod's link, is down", p.Veth)
	case p.Bridge == "" && p.Gateway.IsValid() && !p.HasGW:
		e.add(LayerBridge, Bad, "ip link set "+p.Veth+" master cni0; or recreate the pod", "%s, the host's end of the pod's link, is not on a bridge, and nothing on this host has the address of the pod's gateway %s", p.Veth, p.Gateway)
	case p.Bridge == "":
		e.add(LayerBridge, Bad, "ip link set "+p.Veth+" master cni0; or recreate the pod", "%s, the host's end of the pod's link, is not on a bridge: its packets go nowhere", p.Veth)
	case !p.BridgeUp:
		e.add(LayerBridge, Bad, "ip link set "+p.Bridge+" up", "the bridge %s is down", p.Bridge)
	case p.Blocked:
		e.add(LayerBridge, Bad, fmt.Sprintf("bridge link set dev %s state 3", p.Veth), "the bridge %s does not forward through %s (the port is disabled or blocked)", p.Bridge, p.Veth)
	case p.Gateway.IsValid() && !p.HasGW:
		e.add(LayerBridge, Bad, fmt.Sprintf("ip address add %s/%d dev %s", p.Gateway, e.Subnet.Bits(), p.Bridge), "nothing on this host has the address of the pod's gateway %s; %s should", p.Gateway, p.Bridge)
	case !p.Gateway.IsValid():
		e.add(LayerBridge, OK, "", "%s on %s", p.Veth, p.Bridge)
	default:
		e.add(LayerBridge, OK, "", "%s on %s, which has the gateway's address %s", p.Veth, p.Bridge, p.Gateway)
	}
}

func (e *explainer) gatewayWanted() netip.Addr { return e.Subnet.Masked().Addr().Next() }

func (e *explainer) settings() {
	well := true
	for _, s := range e.Settings {
		if s.Value == s.Want {
			continue
		}
		well = false
		e.add(LayerSetting, Bad, fmt.Sprintf("sysctl -w %s=%s", sysctlName(s.Key), s.Want), "%s is %s: %s", sysctlName(s.Key), s.Value, s.Why)
	}
	if well && len(e.Settings) > 0 {
		e.add(LayerSetting, OK, "", "forwarding is on")
	}
}

func sysctlName(key string) string {
	b := []byte(key)
	for i, c := range b {
		switch c {
		case '/':
			b[i] = '.'
		case '.':
			b[i] = '/'
		}
	}
	return string(b)
}

func (e *explainer) route() {
	if e.Peer != nil || e.NoPeer != "" {
		switch {
		case e.Out.Err != nil && e.Peer != nil:
			e.add(LayerRoute, Bad, "`ip rule` and `ip route show table all` show what takes them before the daemon's route", "this host has no route from %s to %s: %v", e.Local, e.Remote, e.Out.Err)
		case e.Out.Err != nil:
			e.add(LayerRoute, OK, "", "%s: %v, as it should be for a subnet that is not leased", e.Remote, e.Out.Err)
		case e.WantLink != "" && e.Out.Link != e.WantLink:
			e.add(LayerRoute, Bad, fmt.Sprintf("`ip route get %s from %s iif %s` shows it; remove the route that is not culvert's, or the rule (`ip rule`)", e.Remote, e.Local, bridgeOf(e.Pod)),
				"packets to %s leave %s, and not by %s", e.Remote, e.Out, e.WantLink)
		default:
			e.add(LayerRoute, OK, "", "%s %s", e.Remote, e.Out)
		}
	}
	if e.Self {
		return
	}
	switch {
	case e.In.Err != nil:
		e.add(LayerRoute, Bad, "check the addresses of the pods' bridge", "this host has no route to its own pod %s: %v", e.Local, e.In.Err)
	case e.Pod != nil && e.Pod.Bridge != "" && e.In.Link != e.Pod.Bridge:
		e.add(LayerRoute, Bad, fmt.Sprintf("remove the route that matches it (`ip route get %s`)", e.Local), "packets to the pod %s go %s instead of to its bridge %s", e.Local, e.In, e.Pod.Bridge)
	}
}

func bridgeOf(p *Pod) string {
	if p == nil || p.Bridge == "" {
		return "cni0"
	}
	return p.Bridge
}

func (e *explainer) rules(r RuleStep) {
	dropped := false
	for _, v := range r.Verdicts {
		if !v.Drops {
			continue
		}
		state := Bad
		if !v.Certain {
			state = Unsure
		}
		dropped = dropped || state == Bad
		e.add(r.Layer, state, v.Fix, "%s", v.Rule)
	}
	if !dropped && len(r.Verdicts) > 0 {
		chains := make([]string, len(r.Verdicts))
		for i, v := range r.Verdicts {
			chains[i] = v.Chain
		}
		e.add(r.Layer, OK, "", "%s through (%s)", r.Packet, strings.Join(chains, "; "))
	}
}

// device reports a missing tunnel device first, because its routes are missing
// with it.
func (e *explainer) device() {
	if e.Peer != nil && e.Tunnel != "" && !e.TunnelThere {
		e.add(LayerTunnel, Bad, "start the daemon, which creates it", "there is no device %s", e.Tunnel)
	}
}

func (e *explainer) tunnel() {
	if e.Peer == nil || e.Format == "host-gw" || e.WantLink == "" || e.WantLink != e.Tunnel {
		return
	}
	switch {
	case !e.TunnelThere:
		return // already reported
	case !e.TunnelUp && e.Kind == "userspace":
		e.add(LayerTunnel, Bad, "start the daemon, which forwards the packets", "packets sent to %s are not forwarded: no daemon has it open", e.Tunnel)
		return
	case !e.TunnelUp:
		e.add(LayerTunnel, Bad, "ip link set "+e.Tunnel+" up", "the device %s is down", e.Tunnel)
		return
	case e.TunnelLocal.IsValid() && e.Public.IsValid() && e.TunnelLocal != e.Public:
		e.add(LayerTunnel, Unsure, "see `culvert doctor`: outer-source", "%s sends from %s, but the lease has %s", e.Tunnel, e.TunnelLocal, e.Public)
	default:
		e.add(LayerTunnel, OK, "", "%s, %s, to %s", e.Tunnel, e.Format, e.Peer.Public)
	}
	if e.Format != "vxlan" || e.Kind != "kernel" {
		return
	}
	switch {
	case e.Neighbour == "":
		e.add(LayerNeighbour, Bad, fmt.Sprintf("start the daemon, or: ip neigh replace %s lladdr %s nud permanent dev %s", e.Peer.VTEP, e.Peer.MAC, e.Tunnel), "%s has no neighbour %s", e.Tunnel, e.Peer.VTEP)
	case e.Peer.MAC != "" && e.Neighbour != e.Peer.MAC:
		e.add(LayerNeighbour, Bad, fmt.Sprintf("start the daemon, or: ip neigh replace %s lladdr %s nud permanent dev %s", e.Peer.VTEP, e.Peer.MAC, e.Tunnel), "%s has %s for %s, but its lease has %s", e.Tunnel, e.Neighbour, e.Peer.VTEP, e.Peer.MAC)
	default:
		e.add(LayerNeighbour, OK, "", "%s is %s", e.Peer.VTEP, e.Neighbour)
	}
	fix := fmt.Sprintf("start the daemon, or: bridge fdb replace %s dev %s dst %s self permanent", e.Peer.MAC, e.Tunnel, e.Peer.Public)
	switch {
	case e.FDB == "":
		e.add(LayerFDB, Bad, fix, "%s has no FDB entry for %s", e.Tunnel, e.Peer.MAC)
	case e.FDB != e.Peer.Public.String():
		e.add(LayerFDB, Bad, fix, "%s sends frames for %s to %s, but the lease has %s", e.Tunnel, e.Peer.MAC, e.FDB, e.Peer.Public)
	default:
		e.add(LayerFDB, OK, "", "%s is at %s", e.Peer.MAC, e.FDB)
	}
}

// fastPath says which packets do not take the steps that are explained.
func (e *explainer) fastPath() {
	switch {
	case !e.FastPath || e.Peer == nil || e.WantLink == "" || e.WantLink != e.Tunnel:
	case e.NoShortWay != "":
		e.add(LayerFastPath, OK, "", "on before %s; no flow takes the short way from pod to pod: %s", e.Tunnel, e.NoShortWay)
	case !e.ShortWay || e.Self:
		e.add(LayerFastPath, OK, "", "on: packets bypass %s, after the steps above", e.Tunnel)
	case e.Proto == unix.IPPROTO_TCP || e.Proto == unix.IPPROTO_UDP:
		e.add(LayerFastPath, OK, "", "on: the first packets of this flow take the steps above; once established it takes the short way, from the pod's link into the tunnel and back, past the bridge, the rules and %s", e.Tunnel)
	default:
		e.add(LayerFastPath, OK, "", "on: packets bypass %s, after the steps above; TCP connections and UDP once established take the short way from pod to pod (--port shows it)", e.Tunnel)
	}
}

func (e *explainer) underlay() {
	if e.Peer == nil {
		return
	}
	switch r := e.Underlay; {
	case r.Err != nil:
		e.add(LayerUnderlay, Bad, fmt.Sprintf("`ip route get %s` shows it: remove the conflicting route or rule", e.Peer.Public), "this host has no route from %s to the peer's address %s: %v", e.Public, e.Peer.Public, r.Err)
	case names.Ours(r.Link):
		e.add(LayerUnderlay, Bad, "remove the route that matches it", "packets to the peer's address %s would go into the tunnel itself (%s)", e.Peer.Public, r)
	case r.NextState == "failed":
		e.add(LayerUnderlay, Bad, "check the cable, the switch, and that the machine is up", "the next hop on the way to %s (%s) does not answer on its link: no Ethernet address", e.Peer.Public, r)
	default:
		e.add(LayerUnderlay, OK, "", "%s %s", e.Peer.Public, r)
	}
}

// overhead is the number of bytes that the tunnel adds to a packet.
func overhead(format string, is4 bool) int {
	switch {
	case format == "vxlan" && is4:
		return 50
	case format == "vxlan":
		return 70
	case format == "ipip":
		return 20
	}
	return 0
}

func (e *explainer) mtu() {
	if e.Peer == nil || e.Pod == nil || e.UnderlayMTU == 0 {
		return
	}
	narrow := e.UnderlayMTU
	if e.Underlay.MTU > 0 {
		narrow = min(narrow, e.Underlay.MTU)
	}
	room := narrow - overhead(e.Format, e.Peer.Public.Is4())
	switch {
	case e.Pod.MTU > room:
		e.add(LayerMTU, Bad, "recreate the pod once the MTU of the underlay is right; or give the network a smaller Backend.MTU", "the pod sends packets of up to %d bytes, but the path MTU to %s is %d (%d less the tunnel's overhead)", e.Pod.MTU, e.Peer.Public, room, narrow)
	default:
		e.add(LayerMTU, OK, "", "the pod sends up to %d bytes; the path MTU, as far as this node knows, is %d", e.Pod.MTU, room)
	}
}

// Culprit returns the first step that stops packets; false if none does.
func Culprit(steps []Step) (Step, bool) {
	for _, s := range steps {
		if s.State == Bad {
			return s, true
		}
	}
	return Step{}, false
}

// Protocol returns an IP protocol by name, for an address family.
func Protocol(name string, is4 bool) (byte, bool) {
	switch name {
	case "tcp":
		return unix.IPPROTO_TCP, true
	case "udp":
		return unix.IPPROTO_UDP, true
	case "icmp":
		if is4 {
			return unix.IPPROTO_ICMP, true
		}
		return unix.IPPROTO_ICMPV6, true
	}
	return 0, false
}
