package cli

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"culvert/internal/api"
)

func newStatusCommand() *cobra.Command {
	var runDir string
	var watch time.Duration
	var out output
	c := &cobra.Command{
		Use:   "status",
		Short: "Show the state of this node's daemon",
		Long: `Show the state of the node daemon on this machine: its lease, the datapath and why it
was chosen, the connection to the store, the other nodes, and dropped packets.`,
		Example: `  culvert status
  culvert status --watch`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			var before *statusAt
			return show(c.Context(), c.OutOrStdout(), watch, out, func(ctx context.Context, w io.Writer) error {
				ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
				defer cancel()
				s, err := api.GetStatus(ctx, runDir)
				if err != nil {
					return err
				}
				now := time.Now()
				err = out.write(w, s, func(w io.Writer) error { return writeStatus(w, s, before, now) })
				before = &statusAt{s, now}
				return err
			})
		},
	}
	c.Flags().StringVar(&runDir, "run-dir", api.DefaultRunDir, "the daemon's --run-dir")
	addWatch(c, &watch, "with rates beside the totals")
	out.addTo(c)
	return c
}

// statusAt is the status at a point in time.
type statusAt struct {
	api.Status
	at time.Time
}

// writeStatus prints the status as a table, with the rates of traffic and what was dropped
// since before, if that is not nil. Ages are relative to now.
func writeStatus(w io.Writer, s api.Status, before *statusAt, now time.Time) error {
	var old changes
	if before != nil && before.Started.Equal(s.Started) {
		old = changes{before.Datapath, now.Sub(before.at).Seconds()}
	}
	t := newColumns(w)
	line := func(name, format string, args ...any) {
		fmt.Fprintf(t, "%s\t%s\n", name, fmt.Sprintf(format, args...))
	}
	state := "ready"
	if !s.Ready {
		state = "NOT READY: " + s.NotReady
	}
	if !s.Store.Snapshot.IsZero() {
		state += ", serving from the snapshot of " + s.Store.Snapshot.Format(time.RFC3339) + ": " + s.Store.Name() + " is unreachable"
	}
	line("node", "%s, culvert %s, up %s", s.Node, s.Version, age(now.Sub(s.Started)))
	line("state", "%s", state)
	if h := s.Handover; h != nil {
		how := "without closing the datapath"
		if !h.Inherited {
			how = "with a datapath of its own"
		}
		if h.Why != "" {
			how += ", since " + h.Why
		}
		line("handover", "%s ago from pid %d, culvert %s, %s", age(now.Sub(h.At)), h.PID, h.Version, how)
	}
	line("network", "%s", join(s.Networks))
	if s.Lease != nil {
		expires := ""
		if !s.Lease.Expires.IsZero() {
			expires = ", for " + age(s.Lease.Expires.Sub(now)) + " without renewal"
		}
		line("lease", "%s at %s%s", join(s.Lease.Subnets), join(s.Lease.PublicIPs), expires)
	} else if s.Fenced != nil {
		line("lease", "lost %s ago: had %s", age(now.Sub(s.Fenced.Since)), join(s.Fenced.Subnets))
	} else {
		line("lease", "none yet")
	}
	for _, u := range s.Usage {
		line("subnets", "%d of %d in %s are leased or reserved", u.Used, u.Capacity, u.Network)
	}
	line("subnet file", "%s", s.SubnetFile)
	line("underlay", "%s (%s), MTU %d: %s", s.Underlay.Interface, join(s.Underlay.Addrs), s.Underlay.MTU, s.Underlay.Why)
	writeStore(line, s.Store, now)
	if d := s.Datapath; d.Kind != "" {
		line("datapath", "%s/%s on %s, pods' MTU %d: %s", d.WireFormat, d.Kind, d.Device, d.MTU, d.Why)
		for _, m := range d.Mechanisms {
			state := "off"
			if m.On {
				state = "on"
			}
			if m.Why != "" {
				state += ": " + m.Why
			}
			line("  "+m.Name, "%s", state)
		}
		writeFastPath(line, d.FastPath, old)
		line("sent", "%s", old.traffic(d.Egress, old.Egress))
		line("received", "%s", old.traffic(d.Ingress, old.Ingress))
		line("dropped", "%s", old.drops(d.Drops, old.Drops))
		if r := repairs(d.Repairs); r != "" {
			line("repaired", "%s", r)
		}
		if len(d.StalePods) > 0 {
			line("stale pods", "%d were created with another MTU (recreate them): %s", len(d.StalePods), strings.Join(d.StalePods, ", "))
		}
	}
	for _, w := range s.Warnings {
		line("WARNING", "%s (%s)", w, w.Check)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	return writePeers(w, s, now)
}

func writeFastPath(line func(name, format string, args ...any), f *api.FastPath, old changes) {
	switch {
	case f == nil:
		return
	case !f.On:
		line("fast path", "off: %s", f.Why)
	default:
		line("fast path", "on")
	}
	earlier := &api.FastPath{}
	if old.FastPath != nil {
		earlier = old.FastPath
	}
	if f.Egress.Packets+f.Ingress.Packets+uint64(len(f.Slow)) > 0 {
		line("  sent", "%s", old.traffic(f.Egress, earlier.Egress))
		line("  received", "%s", old.traffic(f.Ingress, earlier.Ingress))
		line("  left to the datapath", "%s", old.drops(f.Slow, earlier.Slow))
	}
	switch p := f.Pods; {
	case p == nil:
	case p.Why != "":
		line("  pod to pod", "off: %s (--fast-path=pod ignores that)", p.Why)
	case p.Links > 0:
		line("  pod to pod", "%d of %d frames sent, %d of %d received; %s", p.Egress, f.Egress.Frames, p.Ingress, f.Ingress.Frames, plural(p.Links, "pod"))
	}
	if f.Pods != nil {
		for _, why := range slices.Sorted(maps.Keys(f.Pods.LeftOut)) {
			line("  by the host only", "%s: %s", plural(f.Pods.LeftOut[why], "pod"), why)
		}
	}
}

func writeStore(line func(name, format string, args ...any), s api.Store, now time.Time) {
	where, name, config := strings.Join(s.Endpoints, ", ")+s.Prefix, "etcd", "the one in etcd"
	if s.Kind == "kubernetes" {
		where, name, config = strings.Join(s.Endpoints, ", ")+", annotations "+s.Prefix, s.Kind, "net-conf.json"
	}
	switch {
	case s.Connected:
		line(name, "%s, connected for %s, revision %d", where, age(now.Sub(s.Since)), s.Revision)
	case s.Since.IsZero():
		line(name, "%s, not reached yet", where)
	default:
		line(name, "%s, UNREACHABLE for %s: %s", where, age(now.Sub(s.Since)), s.Error)
	}
	if s.ConfigRefused != "" {
		line("configuration", "%s is REFUSED, the last one stands: %s", config, s.ConfigRefused)
	}
}

func writePeers(w io.Writer, s api.Status, now time.Time) error {
	fmt.Fprintf(w, "\n%d peers\n", len(s.Peers))
	t := newColumns(w)
	t.short = "NODE"
	if len(s.Peers) > 0 {
		fmt.Fprintln(t, "SUBNET\tADDRESS\tFORMAT\tNODE")
	}
	for _, p := range s.Peers {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", join(p.Subnets), join(p.PublicIPs), p.Backend, p.Node)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, p := range s.Datapath.SilentPeers {
		_ = sentence(w, "silent peer: %s at %s: no packet came from it for %s, although this node sends to it", p.Subnet, p.PublicIP, age(now.Sub(p.Since)))
	}
	for _, p := range s.Datapath.NarrowPaths {
		by := ""
		if p.By.IsValid() {
			by = ", as " + p.By.String() + " reported"
		}
		_ = sentence(w, "narrow path: %s at %s: packets of at most %d bytes pass%s (for %s)", p.Subnet, p.PublicIP, p.MTU, by, age(now.Sub(p.Since)))
	}
	for _, r := range s.Rejected {
		_ = sentence(w, "rejected lease: %s: %s", r.Key, r.Reason)
	}
	return nil
}

// changes are the datapath's counters some seconds ago; 0 seconds if there are none to compare
// with.
type changes struct {
	api.Datapath
	seconds float64
}

// traffic formats what one direction carried in all, and its rate since before.
func (c changes) traffic(t, before api.Traffic) string {
	s := fmt.Sprintf("%d packets, %s", t.Packets, size(t.Bytes))
	if c.seconds > 0 && t.Packets >= before.Packets && t.Bytes >= before.Bytes {
		return s + fmt.Sprintf("; %.0f packets/s, %s/s", float64(t.Packets-before.Packets)/c.seconds, size(uint64(float64(t.Bytes-before.Bytes)/c.seconds)))
	}
	if t.Packets > 0 && t.Syscalls > 0 {
		s += fmt.Sprintf(", %.2f system calls per packet", float64(t.Syscalls)/float64(t.Packets))
	}
	return s
}

// drops formats what was dropped in all, and what has come to it since before.
func (c changes) drops(all, before []api.Drop) string {
	if len(all) == 0 {
		return "nothing"
	}
	earlier := make(map[string]uint64)
	for _, d := range before {
		earlier[d.Reason] = d.Packets
	}
	var words []string
	for _, d := range all {
		w := fmt.Sprintf("%s %d", d.Reason, d.Packets)
		if n := d.Packets - earlier[d.Reason]; c.seconds > 0 && n > 0 && n <= d.Packets {
			w += fmt.Sprintf(" (+%d)", n)
		}
		words = append(words, w)
	}
	return strings.Join(words, ", ")
}

func repairs(byKind map[string]uint64) string {
	var words []string
	for _, kind := range slices.Sorted(maps.Keys(byKind)) {
		words = append(words, fmt.Sprintf("%s %d", kind, byKind[kind]))
	}
	return strings.Join(words, ", ")
}

// join formats a list of addresses or prefixes, "-" if it is empty.
func join[T interface {
	netip.Addr | netip.Prefix
	String() string
}](all []T) string {
	if len(all) == 0 {
		return "-"
	}
	words := make([]string, len(all))
	for i, a := range all {
		words[i] = a.String()
	}
	return strings.Join(slices.Clip(words), ", ")
}

func age(d time.Duration) string { return max(0, d).Round(time.Second).String() }
