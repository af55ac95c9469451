package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"culvert/subnet"
)

func newLeaseCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "lease",
		Short: "List, show, check, reserve and release the leases in etcd",
		Args:  cobra.NoArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(newLeaseListCommand(), newLeaseShowCommand(), newLeaseCheckCommand(), newLeaseReserveCommand(), newLeaseReleaseCommand())
	return c
}

// leaseView is a key of the store as the lease commands print it.
type leaseView struct {
	Key            string         `json:"key"`
	Subnets        []netip.Prefix `json:"subnets,omitempty"`
	State          string         `json:"state"` // leased, reserved, resting or malformed
	Node           string         `json:"node,omitempty"`
	Backend        string         `json:"backend,omitempty"`
	PublicIPs      []netip.Addr   `json:"public_ips,omitempty"`
	Expires        time.Time      `json:"expires,omitzero"`
	Problem        string         `json:"problem,omitempty"`
	CreateRevision int64          `json:"create_revision,omitempty"`
	ModRevision    int64          `json:"mod_revision,omitempty"`
	LeaseID        string         `json:"lease_id,omitempty"` // hexadecimal, as etcdctl shows it
	Value          string         `json:"value,omitempty"`
}

func viewOf(e subnet.Entry) leaseView {
	v := leaseView{Key: e.Key, CreateRevision: e.CreateRevision, ModRevision: e.ModRevision, Expires: e.Expires, Value: string(e.Value)}
	if e.ID != 0 {
		v.LeaseID = fmt.Sprintf("%x", e.ID)
	}
	v.Subnets, _ = subnet.ParseKey(e.Key) // e.Lease reports an invalid key
	l, err := e.Lease()
	switch {
	case err != nil:
		v.State, v.Problem = "malformed", err.Error()
	case l.Reserved:
		v.State, v.Node = "reserved", l.Node
	default:
		v.State, v.Node, v.Backend, v.PublicIPs = "leased", l.Node, l.Backend, l.Publics()
	}
	return v
}

func newLeaseListCommand() *cobra.Command {
	var f etcdFlags
	var out output
	var expiry bool
	c := &cobra.Command{
		Use:   "list",
		Short: "List the leases, the reservations, and the subnets in quarantine",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return withStore(c, &f, func(ctx context.Context, admin subnet.Admin) error {
				entries, _, err := admin.Entries(ctx, expiry)
				if err != nil {
					return err
				}
				views := make([]leaseView, 0, len(entries))
				for _, e := range entries {
					v := viewOf(e)
					v.Value = "" // only `lease show` prints it
					views = append(views, v)
				}
				rests, err := admin.Quarantined(ctx)
				if err != nil {
					return err
				}
				for _, r := range rests {
					subnets, _ := subnet.ParseKey(r.Key)
					views = append(views, leaseView{Key: r.Key, Subnets: subnets, State: "resting", Node: r.Node, Expires: r.Until})
				}
				return out.write(c.OutOrStdout(), views, func(w io.Writer) error { return writeLeases(w, views, time.Now()) })
			}, quarantined(nil))
		},
	}
	f.addTo(c.Flags())
	c.Flags().BoolVar(&expiry, "expiry", false, "ask etcd when each lease ends: one request per lease")
	out.addTo(c)
	return c
}

func writeLeases(w io.Writer, views []leaseView, now time.Time) error {
	t := newColumns(w)
	t.dispensable, t.short = []string{"FORMAT"}, "NODE"
	fmt.Fprintln(t, "SUBNET\tSTATE\tADDRESS\tFORMAT\tENDS IN\tNODE")
	for _, v := range views {
		name, ends := v.Key, "-"
		if len(v.Subnets) > 0 {
			name = join(v.Subnets)
		}
		if !v.Expires.IsZero() {
			ends = age(v.Expires.Sub(now))
		} else if v.State == "leased" && v.LeaseID == "" {
			ends = "never"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", name, v.State, join(v.PublicIPs), dash(v.Backend), ends, dash(v.Node))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, v := range views {
		if v.Problem != "" {
			_ = sentence(w, "%s: %s", v.Key, v.Problem)
		}
	}
	return nil
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func newLeaseShowCommand() *cobra.Command {
	var f etcdFlags
	var out output
	c := &cobra.Command{
		Use:               "show SUBNET|ADDRESS|NODE",
		Short:             "Show one lease whole, found by subnet, address or node",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeLeases(&f),
		RunE: func(c *cobra.Command, args []string) error {
			return withStore(c, &f, func(ctx context.Context, admin subnet.Admin) error {
				e, err := findEntry(ctx, admin, args[0], true)
				if err != nil {
					return err
				}
				v := viewOf(e)
				return out.write(c.OutOrStdout(), v, func(w io.Writer) error { return writeLease(w, v, time.Now()) })
			})
		},
	}
	f.addTo(c.Flags())
	out.addTo(c)
	return c
}

func writeLease(w io.Writer, v leaseView, now time.Time) error {
	t := newColumns(w)
	ends := "never, of itself"
	if !v.Expires.IsZero() {
		ends = fmt.Sprintf("%s, in %s, unless it is renewed", v.Expires.Format(time.RFC3339), age(v.Expires.Sub(now)))
	}
	for _, line := range [][2]string{
		{"key", v.Key},
		{"state", v.State},
		{"problem", v.Problem},
		{"node", v.Node},
		{"addresses", join(v.PublicIPs)},
		{"format", v.Backend},
		{"ends", ends},
		{"etcd lease", v.LeaseID},
		{"revisions", fmt.Sprintf("created %d, changed %d", v.CreateRevision, v.ModRevision)},
		{"value", v.Value},
	} {
		if line[1] != "" {
			fmt.Fprintf(t, "%s\t%s\n", line[0], line[1])
		}
	}
	return t.Flush()
}

func newLeaseReserveCommand() *cobra.Command {
	var f etcdFlags
	var owner string
	c := &cobra.Command{
		Use:   "reserve SUBNET [IPV6-SUBNET]",
		Short: "Reserve a subnet, so that no node leases it until it is released",
		Long: `Reserve a subnet, so that no node leases it until it is released. A reservation does not
expire. Its prefix may be longer or shorter than that of the nodes' subnets.`,
		Example: `  culvert lease reserve 10.5.250.0/24 --owner load-balancers`,
		Args:    cobra.RangeArgs(1, 2),
		RunE: func(c *cobra.Command, args []string) error {
			var subnets []netip.Prefix
			for _, a := range args {
				p, err := parseSubnet(a)
				if err != nil {
					return usageError{err}
				}
				subnets = append(subnets, p)
			}
			if len(subnets) == 2 && (!subnets[0].Addr().Is4() || subnets[1].Addr().Is4()) {
				return usagef("reserve: %s and %s: two subnets are an IPv4 one and an IPv6 one, in this order", subnets[0], subnets[1])
			}
			return withStore(c, &f, func(ctx context.Context, admin subnet.Admin) error {
				l, err := admin.Reserve(ctx, owner, subnets)
				if errors.Is(err, subnet.ErrTaken) {
					return fmt.Errorf("%w (see `culvert lease show %s`)", err, subnets[0])
				}
				if err != nil {
					return err
				}
				fmt.Fprintf(c.OutOrStdout(), "reserved %s\n", l)
				return nil
			})
		},
	}
	f.addTo(c.Flags())
	c.Flags().StringVar(&owner, "owner", "administrator", "owner of the reservation, shown in lists")
	return c
}

func newLeaseReleaseCommand() *cobra.Command {
	var f etcdFlags
	var quarantine time.Duration
	c := &cobra.Command{
		Use:   "release SUBNET|NODE",
		Short: "Release a reservation, or the lease of a node that will not return",
		Long: `Release a reservation, or the lease of a node that will not return. The node's
subnet stays in quarantine for a while. A running daemon leases its subnet again: stop it
first, or start it with --release-on-exit and stop it.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeLeases(&f),
		RunE: func(c *cobra.Command, args []string) error {
			return withStore(c, &f, func(ctx context.Context, admin subnet.Admin) error {
				e, err := findEntry(ctx, admin, args[0], false)
				if err != nil {
					return err
				}
				if err := admin.ReleaseKey(ctx, e.Key, e.ModRevision); err != nil {
					return err
				}
				v := viewOf(e)
				fmt.Fprintf(c.OutOrStdout(), "released %s (%s, node %s)\n", e.Key, v.State, dash(v.Node))
				return nil
			}, quarantined(&quarantine))
		},
	}
	f.addTo(c.Flags())
	addQuarantine(c.Flags(), &quarantine)
	return c
}

// parseSubnet parses 10.5.7.0/24, and the form of etcd's keys, 10.5.7.0-24.
func parseSubnet(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(strings.Replace(text, "-", "/", 1))
	switch {
	case err != nil:
		return p, fmt.Errorf("%q is not a subnet such as 10.5.7.0/24", text)
	case p != p.Masked():
		return p, fmt.Errorf("%s has host bits set: the subnet is %s", p, p.Masked())
	}
	return p, nil
}

// findEntry returns the one entry that words refers to: by key, subnet, an address in
// the subnet, or the node's address or identity.
func findEntry(ctx context.Context, admin subnet.Admin, words string, withExpiry bool) (subnet.Entry, error) {
	entries, _, err := admin.Entries(ctx, false)
	if err != nil {
		return subnet.Entry{}, err
	}
	prefix, prefixErr := parseSubnet(words)
	addr, addrErr := netip.ParseAddr(words)
	var found []subnet.Entry
	for _, e := range entries {
		if e.Key == words {
			found = []subnet.Entry{e}
			break
		}
		v := viewOf(e)
		match := v.Node == words && words != ""
		for _, s := range v.Subnets {
			match = match || prefixErr == nil && s == prefix || addrErr == nil && s.Contains(addr)
		}
		for _, p := range v.PublicIPs {
			match = match || addrErr == nil && p == addr
		}
		if match {
			found = append(found, e)
		}
	}
	switch {
	case len(found) == 0:
		return subnet.Entry{}, fmt.Errorf("%s: %w (see `culvert lease list`)", words, subnet.ErrAbsent)
	case len(found) > 1:
		return subnet.Entry{}, fmt.Errorf("%s is %s and %s: name one by its subnet", words, found[0].Key, found[1].Key)
	}
	if !withExpiry {
		return found[0], nil
	}
	entries, _, err = admin.Entries(ctx, true)
	if err != nil {
		return subnet.Entry{}, err
	}
	for _, e := range entries {
		if e.Key == found[0].Key {
			return e, nil
		}
	}
	return subnet.Entry{}, fmt.Errorf("%s: %w", words, subnet.ErrAbsent)
}

// completeLeases completes the subnets in the store.
func completeLeases(f *etcdFlags) cobra.CompletionFunc {
	return func(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		var offers []string
		if len(args) > 0 || fromEnvironment(c.Flags()) != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		_ = withStore(c, f, func(ctx context.Context, admin subnet.Admin) error {
			entries, _, err := admin.Entries(ctx, false)
			for _, e := range entries {
				if v := viewOf(e); len(v.Subnets) > 0 {
					offers = append(offers, v.Subnets[0].String()+"\t"+dash(v.Node))
				}
			}
			return err
		})
		return offers, cobra.ShellCompDirectiveNoFileComp
	}
}
