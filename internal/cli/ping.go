package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/echo"
	"culvert/internal/remedy"
)

// pingOptions are the flags of culvert ping.
type pingOptions struct {
	runDir   string
	all      bool
	count    int
	interval time.Duration
	timeout  time.Duration
	noMTU    bool
	out      output
}

func newPingCommand() *cobra.Command {
	var o pingOptions
	c := &cobra.Command{
		Use:   "ping {NODE|SUBNET|ADDRESS...|--all}",
		Short: "Ping nodes and pods through the tunnel, and measure the path MTU",
		Long: `Send ICMP echo requests through the tunnel, from this node's address in its own
subnet, and show round-trip time, loss, and the largest packet that passes. A
node is named by its identity, its subnet or its underlay address; its tunnel
device answers, whether the node runs culvert or flannel. Any other address of
the cluster network, such as a pod's, is pinged itself.

If there is no answer through the tunnel, the node's underlay address is pinged too, to
distinguish a broken tunnel from a node that is down; and if packets of that node arrive
here meanwhile, or have arrived since it answers nothing, it is the way there that fails.

The exit code is 1 if a target does not answer, or if packets as large as pods may send
do not reach it.`,
		Example: `  culvert ping n2
  culvert ping 10.5.19.7
  culvert ping --all -o json`,
		RunE: func(c *cobra.Command, args []string) error {
			if o.all == (len(args) > 0) {
				return usagef("nothing to ping: name nodes or addresses, or use --all")
			}
			if o.count < 1 || o.interval < 0 || o.timeout <= 0 {
				return usagef("--count needs 1 or more, and --timeout a positive time")
			}
			asking, cancel := context.WithTimeout(c.Context(), 5*time.Second)
			defer cancel()
			s, err := api.GetStatus(asking, o.runDir)
			if err != nil {
				return err
			}
			targets, err := pingTargets(s, args)
			if err != nil {
				return err
			}
			done := whileWaiting(c, fmt.Sprintf("pinging %s", plural(len(targets), "target")))
			results, err := o.pingAll(c.Context(), s, targets)
			done()
			if err != nil {
				return err
			}
			if err := o.out.write(c.OutOrStdout(), results, func(w io.Writer) error { return writePings(w, results) }); err != nil {
				return err
			}
			if slices.ContainsFunc(results, func(r pingResult) bool { return r.Problem != "" }) {
				return errReported
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&o.runDir, "run-dir", api.DefaultRunDir, "the daemon's --run-dir")
	f.BoolVar(&o.all, "all", false, "ping every node")
	f.IntVarP(&o.count, "count", "c", 3, "requests to each")
	f.DurationVarP(&o.interval, "interval", "i", 200*time.Millisecond, "interval between requests")
	f.DurationVar(&o.timeout, "timeout", time.Second, "timeout of a request")
	f.BoolVar(&o.noMTU, "no-mtu", false, "do not measure the largest packet that passes")
	o.out.addTo(c)
	return c
}

// pingTarget is an address to ping, and its node.
type pingTarget struct {
	Node   string       `json:"node,omitempty"`
	Subnet netip.Prefix `json:"subnet,omitzero"`
	Addr   netip.Addr   `json:"address"`
	Public netip.Addr   `json:"public_ip,omitzero"` // of the node, on the underlay
}

// pingResult is the result for one target. Times are in nanoseconds, sizes in bytes of
// the inner IP packet.
type pingResult struct {
	pingTarget
	echo.Summary
	// TimesSeconds are the round-trip times, sorted.
	TimesSeconds []float64 `json:"times_seconds"`
	MTU          int       `json:"mtu,omitempty"`      // the largest packet that passed; 0 if not measured
	WantMTU      int       `json:"want_mtu,omitempty"` // the pods' MTU
	Refused      bool      `json:"refused,omitempty"`  // this host does not send the requests
	// Lost says, of a node that answers on the underlay only, what is lost: "there" if
	// packets from it arrive here, "unknown" if none do. Arrived are those that came while
	// it was pinged, Heard is the last one that the daemon knows.
	Lost    string    `json:"lost,omitempty"`
	Arrived uint64    `json:"arrived,omitempty"`
	Heard   time.Time `json:"heard,omitzero"`
	Problem string    `json:"problem,omitempty"`
	broken  bool      // it answers on the underlay only
}

// pingTargets returns the targets that the arguments name; without arguments, all nodes.
func pingTargets(s api.Status, args []string) ([]pingTarget, error) {
	var targets []pingTarget
	if len(args) == 0 {
		for _, p := range s.Peers {
			targets = append(targets, peerTargets(s, p)...)
		}
		return targets, nil
	}
	for _, arg := range args {
		found, err := pingTargetsOf(s, arg)
		if err != nil {
			return nil, err
		}
		targets = append(targets, found...)
	}
	return targets, nil
}

func pingTargetsOf(s api.Status, arg string) ([]pingTarget, error) {
	addr, notAddr := netip.ParseAddr(arg)
	prefix, notPrefix := netip.ParsePrefix(arg)
	for _, p := range s.Peers {
		switch {
		case arg == p.Node && arg != "",
			notPrefix == nil && slices.Contains(p.Subnets, prefix),
			notAddr == nil && slices.Contains(p.PublicIPs, addr):
			return peerTargets(s, p), nil
		case notAddr != nil:
			continue
		}
		for i, subnet := range p.Subnets {
			if subnet.Contains(addr) {
				return []pingTarget{{Node: p.Node, Subnet: subnet, Addr: addr, Public: p.PublicOf(i)}}, nil
			}
		}
	}
	switch {
	case notAddr == nil && s.Lease != nil && slices.ContainsFunc(s.Lease.Subnets, func(n netip.Prefix) bool { return n.Contains(addr) }):
		return []pingTarget{{Node: s.Node, Addr: addr}}, nil
	case notAddr == nil && slices.ContainsFunc(s.Networks, func(n netip.Prefix) bool { return n.Contains(addr) }):
		return nil, remedy.Errorf("`culvert status` lists them", "no node leases a subnet with %s", addr)
	case notAddr == nil:
		return nil, fmt.Errorf("%s is not in the cluster network (%s)", addr, join(s.Networks))
	case arg == s.Node:
		return nil, remedy.Errorf("name another, or the address of a pod", "%s is this node", arg)
	}
	return nil, remedy.Errorf("`culvert status` lists them", "no node has the name, subnet or address %q", arg)
}

// peerTargets returns a node's tunnel addresses: the first address of each subnet, with
// flannel as well. A node reached by plain routes has none; its underlay address is used
// instead.
func peerTargets(s api.Status, p api.Peer) []pingTarget {
	var targets []pingTarget
	for i, subnet := range p.Subnets {
		t := pingTarget{Node: p.Node, Subnet: subnet, Addr: subnet.Masked().Addr(), Public: p.PublicOf(i)}
		if s.Datapath.WireFormat == "host-gw" {
			t.Addr = t.Public
		}
		targets = append(targets, t)
	}
	return targets
}

// pingWorkers is how many targets are measured in parallel.
const pingWorkers = 256

// pingAll measures all targets and returns the results sorted by node and address.
func (o pingOptions) pingAll(ctx context.Context, s api.Status, targets []pingTarget) ([]pingResult, error) {
	pingers, err := openPingers(s, targets)
	defer func() {
		for _, p := range pingers {
			_ = p.Close()
		}
	}()
	if err != nil {
		return nil, err
	}
	before, _ := api.GetPeers(ctx, o.runDir) // none is known if the daemon cannot tell
	results := make([]pingResult, len(targets))
	var group sync.WaitGroup
	tokens := make(chan struct{}, pingWorkers)
	for i, t := range targets {
		tokens <- struct{}{}
		group.Go(func() {
			defer func() { <-tokens }()
			results[i] = o.ping(ctx, s, t, pingers)
			for _, took := range results[i].Times {
				results[i].TimesSeconds = append(results[i].TimesSeconds, took.Seconds())
			}
		})
	}
	group.Wait()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if slices.ContainsFunc(results, func(r pingResult) bool { return r.broken }) {
		now, _ := api.GetPeers(ctx, o.runDir)
		for i := range results {
			if results[i].broken {
				results[i].judge(s, before, now)
			}
		}
	}
	slices.SortFunc(results, func(a, b pingResult) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), a.Addr.Compare(b.Addr))
	})
	return results, nil
}

// from selects a socket: through the tunnel the source is in this node's subnet, on the
// underlay it is the node's underlay address.
type from struct{ is4, tunnel bool }

// openPingers opens the sockets that the targets need.
func openPingers(s api.Status, targets []pingTarget) (map[from]*echo.Pinger, error) {
	pingers := make(map[from]*echo.Pinger)
	for _, t := range targets {
		for _, f := range []from{{t.Addr.Is4(), true}, {t.Addr.Is4(), false}} {
			if pingers[f] != nil {
				continue
			}
			p, err := echo.Open(sourceOf(s, f))
			if err != nil {
				// The tunnel device may be missing; the requests then fail.
				p, err = echo.Open(unspecified(f.is4))
			}
			if err != nil {
				return pingers, fmt.Errorf("%w (this needs root)", err)
			}
			pingers[f] = p
		}
	}
	return pingers, nil
}

func sourceOf(s api.Status, f from) netip.Addr {
	if f.tunnel && s.Lease != nil && s.Datapath.WireFormat != "host-gw" {
		for _, n := range s.Lease.Subnets {
			if n.Addr().Is4() == f.is4 {
				return n.Masked().Addr()
			}
		}
	}
	if !f.tunnel {
		for _, a := range s.Underlay.Addrs {
			if a.Is4() == f.is4 {
				return a
			}
		}
	}
	return unspecified(f.is4)
}

func unspecified(is4 bool) netip.Addr {
	if is4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// ping measures one target.
func (o pingOptions) ping(ctx context.Context, s api.Status, t pingTarget, pingers map[from]*echo.Pinger) pingResult {
	r := pingResult{pingTarget: t}
	tunnel := pingers[from{t.Addr.Is4(), true}]
	r.Summary, _ = tunnel.Series(ctx, t.Addr, o.count, 0, o.interval, o.timeout)
	if why := refusal(r.Err); r.Answered == 0 && why != "" {
		r.Refused, r.Problem = true, fmt.Sprintf("this host does not send to it: %s (`ip route get %s` and `ip rule` show it)", why, t.Addr)
		return r
	}
	if r.Answered == 0 {
		r.Problem, r.broken = o.silence(ctx, t, r.Err, pingers[from{t.Addr.Is4(), false}])
		return r
	}
	if r.Answered < r.Sent {
		r.Problem = fmt.Sprintf("%d of %d requests were lost", r.Sent-r.Answered, r.Sent)
	}
	if want := s.Datapath.MTU; !o.noMTU && want > 0 {
		r.WantMTU = want
		// On a lossy or slow path one round trip is too short a timeout; the small
		// packets' timeout is the maximum.
		timeout := min(o.timeout, max(100*time.Millisecond, 20*r.Times[len(r.Times)-1]))
		low := 576
		if !t.Addr.Is4() {
			low = 1280
		}
		r.MTU, _ = tunnel.PathMTU(ctx, t.Addr, min(low, want), want, timeout)
		if r.MTU < want {
			lost := fmt.Sprintf("packets of more than %d bytes do not pass, and pods send up to %d: lower the MTU (Backend.MTU), or mend the path", r.MTU, want)
			if r.MTU == 0 {
				lost = fmt.Sprintf("no packet of %d bytes or more passes", min(low, want))
			}
			r.Problem = strings.TrimPrefix(r.Problem+"; "+lost, "; ")
		}
	}
	return r
}

// refusal says why this host's kernel refused to send a packet, "" if it did not. "No route to
// host" is not among them: a router's error, or a neighbour without an answer, is the same.
func refusal(err error) string {
	for errno, why := range map[error]string{
		unix.EACCES: "a prohibit route or rule refuses the packets",
		unix.EINVAL: "a blackhole route or rule takes the packets",
		unix.EPERM:  "a rule of its packet filter, or an IPsec policy, drops the packets",
	} {
		if errors.Is(err, errno) {
			return why
		}
	}
	return ""
}

// silence says why there may be no answer through the tunnel; it also pings the underlay
// address. broken says that this one answers.
func (o pingOptions) silence(ctx context.Context, t pingTarget, why error, underlay *echo.Pinger) (text string, broken bool) {
	words := "no answer"
	if why != nil {
		words = why.Error()
	}
	var refused echo.Refused
	if errors.As(why, &refused) || !t.Public.IsValid() || t.Public.Is4() != t.Addr.Is4() {
		return words, false
	}
	if s, _ := underlay.Series(ctx, t.Public, 2, 0, 0, o.timeout); s.Answered > 0 {
		return fmt.Sprintf("%s through the tunnel, while %s answers on the underlay in %s", words, t.Public, milliseconds(s.Median())), true
	}
	return fmt.Sprintf("%s, nor does %s on the underlay: the node is down, or the underlay does not reach it", words, t.Public), false
}

// recently is how old the last packet of a peer may be to say which direction works: daemons
// probe peers every 30 s, up to 96 of them.
const recently = time.Minute

// judge says, of a node that answers on the underlay only, which direction of the tunnel
// fails, from what the daemon knew of the peers before the requests and knows now. Only the
// direction there can be told: if nothing arrives, both may fail.
func (r *pingResult) judge(s api.Status, before, now api.Peers) {
	const unknown = "a firewall drops the tunnel's packets on the way or there, or no daemon serves there"
	old, then := peerState(before, r.pingTarget)
	p, known := peerState(now, r.pingTarget)
	if r.Addr != r.Subnet.Masked().Addr() || !known { // a pod may be silent by itself
		r.Problem += ": " + unknown
		return
	}
	r.Lost, r.Heard = "unknown", p.Heard
	grown := func(from, to *uint64) uint64 {
		if !then || from == nil || to == nil || *to < *from {
			return 0
		}
		return *to - *from
	}
	if old.Received != nil && p.Received != nil {
		r.Arrived = grown(&old.Received.Packets, &p.Received.Packets)
	}
	switch dropped := grown(old.Drops, p.Drops); {
	case hasWarning(s, "input-drop"):
		r.Problem += ": a rule of this host drops the tunnel's packets on their way in (`culvert doctor` names it)"
	case hasWarning(s, "output-drop"):
		r.Problem += ": a rule of this host drops the tunnel's packets on their way out (`culvert doctor` names it)"
	case dropped > 0:
		r.Problem += ": packets from it arrive here, and culvert drops them (`culvert status` says why)"
	case r.Arrived >= uint64(r.Sent):
		r.Problem += fmt.Sprintf(": %s from it arrived here meanwhile through the tunnel: this node's are lost on the way there, or these are the answers and this host drops them (`culvert doctor` would say why)", plural(int(r.Arrived), "packet"))
	case r.Arrived > 0:
		r.Lost = "there"
		r.Problem += fmt.Sprintf(": %s from it arrived here meanwhile through the tunnel, so this node's are lost on the way there, or dropped there", plural(int(r.Arrived), "packet"))
	case !p.Unanswered.IsZero() && p.Heard.Sub(p.Unanswered) > api.HeardWithin && now.At.Sub(p.Heard) < recently:
		r.Lost = "there"
		r.Problem += fmt.Sprintf(": it has not answered for %s, but packets from it arrive here through the tunnel, the last one %s ago: this node's are lost on the way there, or dropped there, unless this host drops the answers (`culvert doctor` would say why)",
			age(now.At.Sub(p.Unanswered)), age(now.At.Sub(p.Heard)))
	default:
		last := "no packet has arrived from it"
		if !p.Heard.IsZero() {
			last = fmt.Sprintf("the last packet from it arrived %s ago", age(now.At.Sub(p.Heard)))
		}
		r.Problem += fmt.Sprintf(": %s; %s: if `culvert ping` of this node there says that packets arrive, they are lost on the way here", unknown, last)
	}
}

// peerState returns what is known of a target's peer.
func peerState(all api.Peers, t pingTarget) (api.PeerState, bool) {
	i := slices.IndexFunc(all.Peers, func(p api.PeerState) bool { return p.Subnet == t.Subnet && p.PublicIP == t.Public })
	if i < 0 {
		return api.PeerState{}, false
	}
	return all.Peers[i], true
}

func hasWarning(s api.Status, check string) bool {
	return slices.ContainsFunc(s.Warnings, func(w api.Warning) bool { return w.Check == check })
}

// milliseconds formats a round-trip time.
func milliseconds(d time.Duration) string {
	return fmt.Sprintf("%.2f ms", float64(d)/float64(time.Millisecond))
}

func writePings(w io.Writer, results []pingResult) error {
	t := newColumns(w)
	t.dispensable, t.short = []string{"MAX", "MIN"}, "NODE"
	fmt.Fprintln(t, "NODE\tADDRESS\tANSWERED\tMIN\tMEDIAN\tMAX\tLARGEST")
	bad := 0
	for _, r := range results {
		line := []string{cmp.Or(r.Node, "-"), r.Addr.String(), fmt.Sprintf("%d of %d", r.Answered, r.Sent), "-", "-", "-", "-"}
		if r.Answered > 0 {
			line[3], line[4], line[5] = milliseconds(r.Times[0]), milliseconds(r.Median()), milliseconds(r.Times[len(r.Times)-1])
		}
		if r.WantMTU > 0 {
			line[6] = fmt.Sprintf("%d of %d bytes", r.MTU, r.WantMTU)
		}
		fmt.Fprintln(t, strings.Join(line, "\t"))
		if r.Problem != "" {
			bad++
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, r := range results {
		if r.Problem != "" {
			_ = sentence(w, "BAD %s: %s", strings.TrimSpace(r.Node+" "+r.Addr.String()), r.Problem)
		}
	}
	if bad > 0 || len(results) > 1 {
		fmt.Fprintf(w, "%d of %d answer in full\n", len(results)-bad, len(results))
	}
	return nil
}
