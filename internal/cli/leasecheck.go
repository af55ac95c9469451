package cli

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"culvert/subnet"
)

// leaseReport is the result of `culvert lease check`.
type leaseReport struct {
	Usage    []subnet.Usage `json:"usage"`
	Leases   int            `json:"leases"`
	Reserved int            `json:"reserved"`
	Resting  int            `json:"resting"`
	Findings []finding      `json:"findings"`
	NotSeen  []string       `json:"not_seen,omitempty"`
}

// finding is an error or a warning.
type finding struct {
	Level   string `json:"level"` // error or warning
	Kind    string `json:"kind"`  // config, malformed, duplicate, set-aside, eternal, orphan, not-seen, full
	Key     string `json:"key,omitempty"`
	Message string `json:"message"`
}

func (r *leaseReport) add(level, kind, key, format string, args ...any) {
	r.Findings = append(r.Findings, finding{level, kind, key, fmt.Sprintf(format, args...)})
}

// errors counts the findings that make the command fail.
func (r *leaseReport) errors() int {
	n := 0
	for _, f := range r.Findings {
		if f.Level == "error" {
			n++
		}
	}
	return n
}

func newLeaseCheckCommand() *cobra.Command {
	var f etcdFlags
	var out output
	var nodes []string
	c := &cobra.Command{
		Use:   "check",
		Short: "Find bad leases, missing nodes, and a network nearly full",
		Long: `Read everything under the prefix as a node would, and report what is wrong: malformed
values; leases that nodes reject (a subnet, address or MAC that another lease has,
another backend, a subnet outside the network); leases that never expire although no
administrator made them; leases that are no longer renewed (for a third of their
lifetime or more); nodes of --nodes that have no lease; and networks that are 80 % full.

The exit code is 0 if there is no error (there may be warnings), 1 if there is one or if
etcd is unreachable, and 2 if the command line is invalid.`,
		Example: `  culvert lease check --nodes node-1,node-2,node-3 -o json`,
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			var r leaseReport
			err := withStore(c, &f, func(ctx context.Context, admin subnet.Admin) error {
				text, _, err := admin.ConfigText(ctx)
				if err != nil {
					return err
				}
				entries, _, err := admin.Entries(ctx, true)
				if err != nil {
					return err
				}
				rests, err := admin.Quarantined(ctx)
				r = checkLeases(text, entries, nodes, time.Now())
				r.Resting = len(rests)
				return err
			}, quarantined(nil))
			if err != nil {
				return err
			}
			if err := out.write(c.OutOrStdout(), r, func(w io.Writer) error { return writeLeaseReport(w, r) }); err != nil {
				return err
			}
			if n := r.errors(); n > 0 {
				return fmt.Errorf("lease check: %d of %d findings are errors", n, len(r.Findings))
			}
			return nil
		},
	}
	f.addTo(c.Flags())
	c.Flags().StringSliceVar(&nodes, "nodes", nil, "identities of the nodes that there should be, separated by commas")
	out.addTo(c)
	return c
}

// checkLeases checks the store's content as a node without a lease would see it.
func checkLeases(configText []byte, entries []subnet.Entry, nodes []string, now time.Time) leaseReport {
	r := leaseReport{Findings: []finding{}, Usage: []subnet.Usage{}}
	config, warnings, err := subnet.ParseConfig(configText)
	switch {
	case configText == nil:
		r.add("error", "config", "", "there is no network configuration: set one with `culvert config init`")
	case err != nil:
		r.add("error", "config", "", "the network configuration is refused by every node: %v", err)
	}
	for _, w := range warnings {
		r.add("warning", "config", "", "%s", w)
	}
	seen, byNode := map[string]bool{}, map[string]string{}
	for _, e := range entries {
		l, err := e.Lease()
		switch {
		case err != nil:
			r.add("error", "malformed", e.Key, "%v", err)
			continue
		case l.Reserved:
			r.Reserved++
		default:
			r.Leases++
			seen[l.Node] = true
		}
		switch {
		case !l.Reserved && e.ID == 0:
			r.add("warning", "eternal", e.Key, "%s never expires: an older reservation of flannel's, or a node that no longer exists; `culvert lease release %s` frees it", l, l.Subnets()[0])
		case e.ID != 0 && e.Expires.IsZero():
			r.add("warning", "not-seen", e.Key, "%s has just expired", l)
		case e.ID != 0 && e.Expires.Sub(now) < e.Lifetime*6/10:
			r.NotSeen = append(r.NotSeen, l.Node)
			r.add("warning", "not-seen", e.Key, "%s was not renewed for %s, and ends in %s: is its daemon running?", l, age(e.Lifetime-e.Expires.Sub(now)), age(e.Expires.Sub(now)))
		}
		if k, twice := byNode[l.Node]; twice && l.Node != "" && !l.Reserved {
			r.add("error", "duplicate", e.Key, "node %q holds %s too", l.Node, k)
		} else if !l.Reserved {
			byNode[l.Node] = e.Key
		}
	}
	if len(config.Networks) > 0 {
		s := subnet.BuildSnapshot(config, subnet.Lease{}, entries, 0)
		r.Usage = s.Usage
		for _, x := range s.Rejected {
			if !slices.ContainsFunc(r.Findings, func(f finding) bool { return f.Kind == "malformed" && f.Key == x.Key }) {
				kind := "set-aside"
				if strings.Contains(x.Reason, "which is older or ours") {
					kind, x.Reason = "duplicate", strings.TrimSuffix(x.Reason, " or ours")
				}
				r.add("error", kind, x.Key, "nodes reject it: %s", x.Reason)
			}
		}
		for _, u := range s.Usage {
			if u.Share() >= subnet.NearlyFull {
				r.add("warning", "full", "", "%s: %d of %d subnets are taken: make room with a Network that contains it", u.Network, u.Used, u.Capacity)
			}
		}
		r.checkReserved(config, entries)
	}
	for _, n := range nodes {
		if !seen[n] {
			r.NotSeen = append(r.NotSeen, n)
			r.add("error", "not-seen", "", "node %q has no lease", n)
		}
	}
	return r
}

// checkReserved finds reservations outside the network, and those that overlap another
// reservation. BuildSnapshot does not check them.
func (r *leaseReport) checkReserved(config subnet.Config, entries []subnet.Entry) {
	var reserved []subnet.Entry
	for _, e := range entries {
		if l, err := e.Lease(); err == nil && l.Reserved {
			reserved = append(reserved, e)
			for _, s := range l.Subnets() {
				if !slices.ContainsFunc(config.Networks, func(n subnet.Network) bool { return n.Prefix.Overlaps(s) }) {
					r.add("warning", "orphan", e.Key, "a reservation outside the network: it has no effect")
				}
			}
		}
	}
	for i, a := range reserved {
		overlaps := func(s netip.Prefix) bool {
			return slices.ContainsFunc(reserved[:i], func(b subnet.Entry) bool {
				subnets, _ := subnet.ParseKey(b.Key)
				return slices.ContainsFunc(subnets, s.Overlaps)
			})
		}
		if subnets, err := subnet.ParseKey(a.Key); err == nil && slices.ContainsFunc(subnets, overlaps) {
			r.add("warning", "orphan", a.Key, "overlaps another reservation")
		}
	}
}

func writeLeaseReport(w io.Writer, r leaseReport) error {
	fmt.Fprintf(w, "%d leases, %d reservations, %d subnets in quarantine\n", r.Leases, r.Reserved, r.Resting)
	for _, u := range r.Usage {
		fmt.Fprintf(w, "%s: %d of %d subnets taken (%.0f %%)\n", u.Network, u.Used, u.Capacity, 100*u.Share())
	}
	for _, f := range r.Findings {
		key := f.Key
		if key != "" {
			key += ": "
		}
		fmt.Fprintf(w, "%s: %s: %s%s\n", f.Level, f.Kind, key, f.Message)
	}
	if len(r.Findings) == 0 {
		fmt.Fprintln(w, "nothing is wrong")
	}
	return nil
}
