package cli

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"culvert/internal/api"
)

// peersOptions are the flags of culvert peers.
type peersOptions struct {
	runDir  string
	sort    string
	reverse bool
	filter  []string
	watch   time.Duration
	out     output
}

func newPeersCommand() *cobra.Command {
	var o peersOptions
	c := &cobra.Command{
		Use:   "peers",
		Short: "Show the other nodes: state, latency, path MTU, traffic",
		Long: `Show, for each subnet of each other node, how packets go there (userspace, kernel, fast
path, or a direct route without a tunnel), its state, the round-trip time, the path MTU
and the traffic.

States: active (packets came from it recently: pods' packets, or its probes), idle (it
answers this node's probes), silent (it did not answer, and nothing else came from it),
unknown (not probed yet). The probes are ICMP echo requests through the tunnel, which
flannel's nodes answer too: one every 30 s, fewer to a peer with traffic, and at most 96
in 30 s to all peers together.

HEARD is the time since the last packet from it. SENT and RECEIVED are bytes of pods'
packets since the datapath was opened; DROPS are packets from the peer that this node
dropped. "-" means not known. On a narrow terminal (80 columns if there is none),
ADDRESS, MTU, HEARD, DROPS and WAY are left out, in this order; -o wide shows all.

Filters: text that the node, subnet or address contains, or KEY=VALUE of
  node=worker-*  subnet=10.5.0.0/18  address=192.0.2.7
  way=kernel     state=silent,unknown
Several filters must all match; several values of one key are alternatives.`,
		Example: `  culvert peers --sort rtt
  culvert peers --filter state=silent
  culvert peers --watch=1s worker-7`,
		RunE: func(c *cobra.Command, args []string) error {
			o.filter = append(o.filter, args...)
			return o.run(c.Context(), c.OutOrStdout())
		},
	}
	f := c.Flags()
	f.StringVar(&o.runDir, "run-dir", api.DefaultRunDir, "the daemon's --run-dir")
	f.StringVar(&o.sort, "sort", "node", "sort by "+strings.Join(peerOrders(), ", ")+"; numbers in descending order")
	f.BoolVar(&o.reverse, "reverse", false, "reverse the order")
	f.StringArrayVar(&o.filter, "filter", nil, "show only these (may be given several times)")
	addWatch(c, &o.watch, "with rates instead of totals")
	o.out.addTo(c, "wide")
	_ = c.RegisterFlagCompletionFunc("sort", cobra.FixedCompletions(peerOrders(), cobra.ShellCompDirectiveNoFileComp))
	return c
}

func (o peersOptions) run(ctx context.Context, w io.Writer) error {
	order, ok := peerOrder[o.sort]
	if !ok {
		return usagef("--sort %s: one of %s", o.sort, strings.Join(peerOrders(), ", "))
	}
	keep, err := peerFilter(o.filter)
	if err != nil {
		return err
	}
	var before *api.Peers
	return show(ctx, w, o.watch, o.out, func(ctx context.Context, w io.Writer) error {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		all, err := api.GetPeers(ctx, o.runDir)
		if err != nil {
			return err
		}
		now := all
		all.Peers = slices.DeleteFunc(slices.Clone(all.Peers), func(p api.PeerState) bool { return !keep(p) })
		slices.SortStableFunc(all.Peers, order)
		if o.reverse {
			slices.Reverse(all.Peers)
		}
		out, wide := o.out, o.out == "wide"
		if wide {
			out = "table"
		}
		err = out.write(w, all, func(w io.Writer) error { return writePeerStates(w, all, before, wide) })
		before = &now
		return err
	})
}

// peerOrder is the comparison for each --sort order. Numbers sort the largest first and
// unknown ones last.
var peerOrder = map[string]func(a, b api.PeerState) int{
	"node":     func(a, b api.PeerState) int { return cmp.Compare(a.Node, b.Node) },
	"subnet":   func(a, b api.PeerState) int { return a.Subnet.Compare(b.Subnet) },
	"address":  func(a, b api.PeerState) int { return a.PublicIP.Compare(b.PublicIP) },
	"way":      func(a, b api.PeerState) int { return cmp.Compare(a.Way, b.Way) },
	"state":    func(a, b api.PeerState) int { return cmp.Compare(peerSeverity[b.State], peerSeverity[a.State]) },
	"rtt":      func(a, b api.PeerState) int { return cmp.Compare(b.RTTSeconds, a.RTTSeconds) },
	"mtu":      func(a, b api.PeerState) int { return cmp.Compare(b.PathMTU, a.PathMTU) },
	"heard":    func(a, b api.PeerState) int { return b.Heard.Compare(a.Heard) },
	"sent":     func(a, b api.PeerState) int { return cmp.Compare(bytesOf(b.Sent), bytesOf(a.Sent)) },
	"received": func(a, b api.PeerState) int { return cmp.Compare(bytesOf(b.Received), bytesOf(a.Received)) },
	"drops":    func(a, b api.PeerState) int { return cmp.Compare(dropsOf(b), dropsOf(a)) },
}

var peerSeverity = map[string]int{api.PeerSilent: 3, api.PeerUnknown: 2, api.PeerIdle: 1, api.PeerActive: 0}

func peerOrders() []string { return slices.Sorted(maps.Keys(peerOrder)) }

func bytesOf(c *api.PeerCount) int64 {
	if c == nil {
		return -1
	}
	return int64(c.Bytes)
}

func dropsOf(p api.PeerState) int64 {
	if p.Drops == nil {
		return -1
	}
	return int64(*p.Drops)
}

// peerFilter returns a function that reports whether all filters match.
func peerFilter(filters []string) (keep func(api.PeerState) bool, err error) {
	var all []func(api.PeerState) bool
	for _, f := range filters {
		key, values, named := strings.Cut(f, "=")
		if !named {
			all = append(all, func(p api.PeerState) bool {
				return strings.Contains(p.Node, f) || strings.Contains(p.Subnet.String(), f) || strings.Contains(p.PublicIP.String(), f)
			})
			continue
		}
		var any []func(api.PeerState) bool
		for _, value := range strings.Split(values, ",") {
			one, err := peerCondition(key, value)
			if err != nil {
				return nil, err
			}
			any = append(any, one)
		}
		all = append(all, func(p api.PeerState) bool {
			return slices.ContainsFunc(any, func(one func(api.PeerState) bool) bool { return one(p) })
		})
	}
	return func(p api.PeerState) bool {
		return !slices.ContainsFunc(all, func(f func(api.PeerState) bool) bool { return !f(p) })
	}, nil
}

func peerCondition(key, value string) (func(api.PeerState) bool, error) {
	switch key {
	case "node":
		if _, err := path.Match(value, ""); err != nil {
			return nil, usagef("--filter node=%s: %w", value, err)
		}
		return func(p api.PeerState) bool { ok, _ := path.Match(value, p.Node); return ok }, nil
	case "subnet":
		prefix, err := netip.ParsePrefix(value)
		if err != nil {
			return nil, usagef("--filter subnet=%s: not a prefix such as 10.5.0.0/18", value)
		}
		return func(p api.PeerState) bool {
			return prefix.Bits() <= p.Subnet.Bits() && prefix.Contains(p.Subnet.Addr())
		}, nil
	case "address":
		addr, err := netip.ParseAddr(value)
		if err != nil {
			return nil, usagef("--filter address=%s: not an IP address", value)
		}
		return func(p api.PeerState) bool { return p.PublicIP == addr || p.Subnet.Contains(addr) }, nil
	case "way":
		return func(p api.PeerState) bool { return p.Way == value }, nil
	case "state":
		return func(p api.PeerState) bool { return p.State == value }, nil
	}
	return nil, usagef("--filter %s=: one of node, subnet, address, way, state", key)
}

// writePeerStates prints the peers as a table, with traffic as rates since before, or as
// totals if before is nil.
func writePeerStates(w io.Writer, all api.Peers, before *api.Peers, wide bool) error {
	t := newColumns(w)
	if !wide {
		t.dispensable, t.short = []string{"ADDRESS", "MTU", "HEARD", "DROPS", "WAY"}, "NODE"
	}
	columns := []string{"NODE", "SUBNET", "ADDRESS", "STATE", "WAY", "RTT", "MTU", "HEARD", "SENT", "RECEIVED", "DROPS"}
	if wide {
		columns = append(columns, "FORMAT", "ASKED")
	}
	fmt.Fprintln(t, strings.Join(columns, "\t"))
	earlier := make(map[netip.Prefix]api.PeerState)
	var seconds float64
	if before != nil {
		seconds = all.At.Sub(before.At).Seconds()
		for _, p := range before.Peers {
			earlier[p.Subnet] = p
		}
	}
	states := make(map[string]int)
	for _, p := range all.Peers {
		states[p.State]++
		old := earlier[p.Subnet]
		cells := []string{
			cmp.Or(p.Node, "-"), p.Subnet.String(), p.PublicIP.String(), p.State, p.Way, "-", "-", ago(all.At, p.Heard),
			counted(p.Sent, old.Sent, seconds, wide), counted(p.Received, old.Received, seconds, wide), "-",
		}
		if p.RTTSeconds > 0 {
			cells[5] = fmt.Sprintf("%.2f ms", p.RTTSeconds*1000)
		}
		if p.PathMTU > 0 {
			cells[6] = fmt.Sprint(p.PathMTU)
		}
		if p.Drops != nil {
			cells[10] = fmt.Sprint(*p.Drops)
		}
		if wide {
			cells = append(cells, p.Backend, ago(all.At, p.Asked))
		}
		fmt.Fprintln(t, strings.Join(cells, "\t"))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, p := range all.Peers {
		if p.Problem != "" {
			_ = sentence(w, "BAD %s: %s: `culvert ping %s` says more", strings.TrimSpace(p.Node+" "+p.Subnet.String()), p.Problem, p.Subnet)
		}
	}
	var words []string
	for _, s := range []string{api.PeerActive, api.PeerIdle, api.PeerSilent, api.PeerUnknown} {
		if n := states[s]; n > 0 {
			words = append(words, fmt.Sprintf("%d %s", n, s))
		}
	}
	fmt.Fprintf(w, "%d peers' subnets", len(all.Peers))
	if len(words) > 0 {
		fmt.Fprintf(w, ": %s", strings.Join(words, ", "))
	}
	_, err := fmt.Fprintln(w)
	return err
}

// ago formats the time since then; "-" if then is zero.
func ago(now, then time.Time) string {
	if then.IsZero() {
		return "-"
	}
	return age(now.Sub(then))
}

// counted formats one direction's traffic: the total, or the rate over some seconds.
func counted(c, before *api.PeerCount, seconds float64, wide bool) string {
	switch {
	case c == nil:
		return "-"
	case seconds > 0 && before != nil && c.Bytes >= before.Bytes:
		s := size(uint64(float64(c.Bytes-before.Bytes)/seconds)) + "/s"
		if wide {
			s = fmt.Sprintf("%.0f packets/s, %s", float64(c.Packets-before.Packets)/seconds, s)
		}
		return s
	case wide:
		return fmt.Sprintf("%d packets, %s", c.Packets, size(c.Bytes))
	}
	return size(c.Bytes)
}
