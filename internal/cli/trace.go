package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"culvert/internal/api"
	"culvert/internal/daemon"
	"culvert/internal/host"
	"culvert/internal/names"
	"culvert/internal/remedy"
	"culvert/internal/trace"
	"culvert/subnet"
)

// traceOptions are the flags of culvert trace.
type traceOptions struct {
	runDir   string
	port     uint16
	protocol string
	far      string
	half     bool
	noProbe  bool
	out      output
}

// The verdicts of a trace.
const (
	tracePasses  = "passes"
	traceStopped = "stopped"
	traceUnknown = "unknown"
)

// traceResult is the result of `culvert trace`.
type traceResult struct {
	From     netip.Addr   `json:"from"`
	To       netip.Addr   `json:"to"`
	Protocol string       `json:"protocol"`
	Port     uint16       `json:"port,omitempty"`
	Verdict  string       `json:"verdict"` // passes, stopped or unknown
	Culprit  *trace.Step  `json:"culprit,omitempty"`
	Steps    []trace.Step `json:"steps"`
	Probe    *trace.Probe `json:"probe,omitempty"`
}

func newTraceCommand() *cobra.Command {
	var o traceOptions
	c := &cobra.Command{
		Use:   "trace FROM TO",
		Short: "Show the path of packets between two pods, and what stops them",
		Long: `Show, step by step, the path of packets from a pod of this node to a pod or a node
anywhere in the cluster network: pod, bridge, kernel settings, route, each rule of
nftables and iptables that decides, lease, neighbour, FDB, tunnel, underlay, MTU.
Then a real packet is sent from the pod and followed (nftables' trace, the tunnel's
counters). If something stops packets, it is named, with the command that fixes it.

FROM and TO are addresses; TO may be a node's identity, and FROM may be "node" for
this node itself. On the node of TO the same command shows the other half of the path.
With --far, such as --far 'ssh root@n2 culvert', this command runs it there; without it,
probes to the other node narrow down what is wrong there.

It needs no running daemon: it uses what the last one left. The exit code is 1 if packets
are stopped.`,
		Example: `  culvert trace 10.5.72.2 10.5.19.7
  culvert trace 10.5.72.2 10.5.19.7 --protocol tcp --port 443
  culvert trace node n2 --far 'ssh root@n2 culvert'`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			done := whileWaiting(c, "sending packets; unanswered ones take some seconds")
			r, err := o.trace(c.Context(), args[0], args[1])
			done()
			if err != nil {
				return err
			}
			if err := o.out.write(c.OutOrStdout(), r, func(w io.Writer) error { return writeTrace(w, r) }); err != nil {
				return err
			}
			if r.Verdict == traceStopped && !o.half {
				return errReported
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&o.runDir, "run-dir", api.DefaultRunDir, "the daemon's --run-dir")
	f.StringVar(&o.protocol, "protocol", "", "icmp, tcp or udp (default: icmp, and with --port tcp)")
	f.Uint16Var(&o.port, "port", 0, "destination port of TCP and UDP")
	f.StringVar(&o.far, "far", "", "command that runs culvert on the node of TO, such as 'ssh root@n2 culvert'")
	f.BoolVar(&o.noProbe, "no-probe", false, "send no packet")
	f.BoolVar(&o.half, "half", false, "only this node's half, of packets that come from FROM")
	_ = f.MarkHidden("half")
	_ = c.RegisterFlagCompletionFunc("protocol", cobra.FixedCompletions([]string{"icmp", "tcp", "udp"}, cobra.ShellCompDirectiveNoFileComp))
	o.out.addTo(c)
	return c
}

// trace explains the path from this node's state. Toward a remote end, and without
// --half, it also sends probes and asks the far node.
func (o traceOptions) trace(ctx context.Context, fromText, toText string) (traceResult, error) {
	var r traceResult
	switch {
	case o.protocol == "" && o.port != 0:
		o.protocol = "tcp"
	case o.protocol == "":
		o.protocol = "icmp"
	case o.protocol != "icmp" && o.port == 0:
		return r, usagef("--protocol %s needs a --port", o.protocol)
	case o.protocol == "icmp" && o.port != 0:
		return r, usagef("--port %d: ICMP has no ports", o.port)
	}
	if err := host.MayConfigure(); err != nil {
		return r, err
	}
	diagnosis, err := daemon.Diagnose(ctx, o.runDir)
	if err != nil {
		return r, err
	}
	if diagnosis.Snapshot == nil {
		why, do := "there is no copy of the leases in "+o.runDir, "start one with `culvert run`, or give its --run-dir"
		for _, f := range diagnosis.Problems {
			why, do = f.Text, f.Fix
		}
		return r, remedy.Errorf(do, "the wanted state of this host is unknown: %s", why)
	}
	to, err := traceEnd(diagnosis, toText, true)
	if err != nil {
		return r, err
	}
	from, err := traceEnd(diagnosis, fromText, to.Is4())
	if err != nil {
		return r, err
	}
	if from.Is4() != to.Is4() {
		return r, usagef("%s and %s are of two address families", from, to)
	}
	r = traceResult{From: from, To: to, Protocol: o.protocol, Port: o.port, Verdict: traceUnknown}
	own := diagnosis.Snapshot.Self.Subnets()
	has := func(a netip.Addr) bool {
		return slices.ContainsFunc(own, func(p netip.Prefix) bool { return p.Contains(a) })
	}
	var p trace.Path
	switch {
	case has(from):
		p, err = tracePath(diagnosis, from, to, true)
	case has(to):
		p, err = tracePath(diagnosis, to, from, false)
	default:
		return r, remedy.Errorf("run it on the node of one of them (`culvert status` lists them)", "neither %s nor %s is in this node's subnet %s", from, to, join(own))
	}
	if err != nil {
		return r, err
	}
	proto, ok := trace.Protocol(o.protocol, from.Is4())
	if !ok {
		return r, usagef("--protocol %s: icmp, tcp or udp", o.protocol)
	}
	p.Proto, p.Port = proto, o.port
	if s, err := api.GetStatus(ctx, o.runDir); err == nil { // without a daemon there is no fast path
		p.FastPath, p.ShortWay, p.NoShortWay = fastPathOf(s.Datapath.FastPath)
	}
	if p, err = trace.Read(p); err != nil {
		return r, err
	}
	r.Steps = trace.Explain(p)
	culprit, found := trace.Culprit(r.Steps)
	if o.half || !p.Toward {
		r.judge(culprit, found)
		return r, nil
	}
	return r, o.live(ctx, p, &r)
}

// judge records the step that stops packets, if one was found.
func (r *traceResult) judge(s trace.Step, found bool) {
	if found {
		r.Verdict, r.Culprit = traceStopped, &s
	}
}

// live sends probes. If there is no answer and nothing on this node explains it, it asks
// the far node, or deduces the cause.
func (o traceOptions) live(ctx context.Context, p trace.Path, r *traceResult) error {
	culprit, found := trace.Culprit(r.Steps)
	if !o.noProbe && (p.Pod != nil || p.Self) {
		probe, err := trace.Send(ctx, p)
		if err != nil {
			return err
		}
		r.Probe = &probe
		far := o.isElsewhere(p)
		switch {
		case probe.Answered && (probe.Want == 0 || probe.Largest >= probe.Want):
			r.Verdict = tracePasses
			return nil
		case probe.Answered:
			r.judge(trace.Step{
				Node: p.Node, Layer: trace.LayerMTU, State: trace.Bad,
				Detail: fmt.Sprintf("packets of up to %d bytes reach %s, but the pod sends up to %d: larger ones are lost silently", probe.Largest, p.Remote, probe.Want),
				Fix:    "repair the link on the path; or give the network a smaller Backend.MTU (`culvert config set`) and recreate the pods",
			}, true)
			return nil
		case len(probe.Dropped) > 0 && !(found && culprit.Layer == trace.LayerRules):
			d := probe.Dropped[0]
			culprit, found = trace.Step{Node: p.Node, Layer: trace.LayerRules, State: trace.Bad, Detail: d.String(), Fix: d.Fix()}, true
		case !found && far && o.far == "":
			culprit, found = trace.Deduce(ctx, p), true
		}
	}
	if !found && o.isElsewhere(p) && o.far != "" {
		steps, err := o.askFar(ctx, r)
		if err != nil {
			return err
		}
		r.Steps = append(r.Steps, steps...)
		if culprit, found = trace.Culprit(steps); !found && r.Probe != nil {
			culprit, found = trace.Deduce(ctx, p), true
		}
	}
	r.judge(culprit, found)
	return nil
}

// fastPathOf tells whether the fast path is on, whether flows between pods take the short way,
// and if not though they were to, why.
func fastPathOf(f *api.FastPath) (on, short bool, why string) {
	if f == nil || !f.On {
		return false, false, ""
	}
	if f.Pods == nil {
		return true, false, ""
	}
	return true, f.Pods.Carries(), f.Pods.Why
}

func (traceOptions) isElsewhere(p trace.Path) bool { return p.Peer != nil }

// farTimeout bounds askFar.
const farTimeout = 30 * time.Second

// askFar runs the trace on the far node, with the command of --far, and returns its
// steps.
func (o traceOptions) askFar(ctx context.Context, r *traceResult) ([]trace.Step, error) {
	ctx, cancel := context.WithTimeout(ctx, farTimeout)
	defer cancel()
	words := append(strings.Fields(o.far), "trace", r.From.String(), r.To.String(), "--half", "--protocol", o.protocol, "-o", "json")
	if o.port != 0 {
		words = append(words, "--port", fmt.Sprint(o.port))
	}
	cmd := exec.CommandContext(ctx, words[0], words[1:]...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("--far %s: %w: %s", o.far, err, strings.TrimSpace(errs.String()))
	}
	var far traceResult
	if err := json.Unmarshal(out.Bytes(), &far); err != nil {
		return nil, fmt.Errorf("--far %s: its answer cannot be read: %w", o.far, err)
	}
	return far.Steps, nil
}

// traceEnd resolves an end of the trace: an address, or a node's name.
func traceEnd(o daemon.Diagnosis, text string, is4 bool) (netip.Addr, error) {
	if a, err := netip.ParseAddr(text); err == nil {
		return a.Unmap(), nil
	}
	leases := slices.Clone(o.Snapshot.Peers)
	if text == "node" || text == o.Snapshot.Self.Node {
		leases = []subnet.Lease{o.Snapshot.Self}
		text = o.Snapshot.Self.Node
	}
	for _, l := range leases {
		if l.Node != text {
			continue
		}
		if e, ok := l.Endpoint(is4); ok {
			return e.Subnet.Masked().Addr(), nil
		}
	}
	return netip.Addr{}, usagef("%q is neither an address nor the identity of a node (`culvert status` lists them)", text)
}

// tracePath builds the path between an address of this node and another one from the
// leases and the datapath's plan.
func tracePath(o daemon.Diagnosis, local, remote netip.Addr, toward bool) (trace.Path, error) {
	s := *o.Snapshot
	p := trace.Path{
		Node: s.Self.Node, Local: local, Remote: remote, Toward: toward,
		Format: s.Config.Backend.Type, Kind: string(o.Datapath), TunnelPort: s.Config.Backend.Port,
	}
	self, ok := s.Self.Endpoint(local.Is4())
	if !ok {
		return p, fmt.Errorf("this node leases no subnet of the family of %s", local)
	}
	p.Subnet, p.Public = self.Subnet, self.Public
	if a := o.Underlay.Addr(self.Public.Is4()); a.IsValid() {
		p.Public = a // the address on the link; the published one may be behind NAT
	}
	for _, l := range s.Peers {
		if e, ok := l.Endpoint(remote.Is4()); ok && e.Subnet.Contains(remote) {
			p.Peer = &trace.Peer{
				Node: l.Node, Subnet: e.Subnet, Public: e.Public, MAC: e.VTEP.MAC.String(), VTEP: e.Subnet.Masked().Addr(), VNI: e.VTEP.VNI,
			}
			if l.Node == "" {
				p.Peer.Node = e.Public.String()
			}
		}
	}
	if p.Peer == nil && !self.Subnet.Contains(remote) {
		p.NoPeer = "no node leases it"
		if !slices.ContainsFunc(s.Config.Networks, func(n subnet.Network) bool { return n.Prefix.Contains(remote) }) {
			p.NoPeer = "it is not in the cluster network"
		}
		for _, r := range s.Rejected {
			subnets, err := subnet.ParseKey(r.Key)
			if err == nil && slices.ContainsFunc(subnets, func(n netip.Prefix) bool { return n.Contains(remote) }) {
				p.NoPeer = fmt.Sprintf("the lease %s was rejected: %s", r.Key, r.Reason)
			}
		}
	}
	best := host.Route{}
	for _, r := range o.State.Routes {
		if r.Link != "" && r.To.Contains(remote) && (best.Link == "" || r.To.Bits() > best.To.Bits()) {
			best = r
		}
	}
	if p.Peer != nil {
		p.WantLink, p.WantVia = best.Link, best.Via
		if names.Ours(best.Link) {
			p.Tunnel = best.Link
		}
	}
	return p, nil
}

func writeTrace(w io.Writer, r traceResult) error {
	what := r.Protocol
	if r.Port != 0 {
		what += fmt.Sprintf(" port %d", r.Port)
	}
	fmt.Fprintf(w, "%s -> %s, %s\n\n", r.From, r.To, what)
	t := newColumns(w)
	for _, s := range r.Steps {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", s.Node, s.State, s.Layer, s.Detail)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w)
	if p := r.Probe; p != nil {
		switch {
		case p.Answered && p.Want > 0:
			_ = sentence(w, "sent: %s: answered in %s; packets of %d of %d bytes pass", p.What, milliseconds(p.Took), p.Largest, p.Want)
		case p.Answered:
			_ = sentence(w, "sent: %s: answered in %s", p.What, milliseconds(p.Took))
		default:
			_ = sentence(w, "sent: %s: %s; the tunnel device sent %d packets meanwhile and received %d", p.What, p.Said, p.Sent, p.Received)
		}
	}
	if p := r.Probe; p != nil && !p.Answered {
		if p.Limit != "" {
			_ = sentence(w, "the packet was not followed through this host's rules: %s", p.Limit)
		}
		for _, reason := range slices.Sorted(maps.Keys(p.Reasons)) {
			_ = sentence(w, "the kernel dropped meanwhile, on this machine: %d, %s", p.Reasons[reason], reason)
		}
	}
	switch r.Verdict {
	case tracePasses:
		fmt.Fprintln(w, "PASSES")
	case traceStopped:
		_ = sentence(w, "STOPPED at %s", r.Culprit)
		if r.Culprit.Fix != "" {
			_ = sentence(w, "fix: %s", r.Culprit.Fix)
		}
	default:
		_, err := fmt.Fprintln(w, "nothing on this node stops it; no packet was sent")
		return err
	}
	return nil
}
