// Package doctor examines a host for what keeps culvert's packets from passing,
// with or without a running daemon. It changes nothing; what can be done about a
// finding comes with it as an Action. What a running daemon warns of, or one that
// is started would find (host.Preview), is part of what it finds, under the same
// check ids: api.Checks is the one list of them.
package doctor

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"culvert/internal/api"
	"culvert/internal/host"
)

// Severity says what a finding means for packets.
type Severity string

const (
	// Bad keeps packets from passing, or pods from being added, now.
	Bad Severity = "bad"
	// Risk does so under a condition: load, a reboot, another program's next run.
	Risk Severity = "risk"
)

// Finding is what a check found wrong: the check's id, the evidence and the fix,
// and how bad it is.
type Finding struct {
	Severity Severity `json:"severity"`
	api.Warning
	// Repairs are what culvert does about it by itself: a daemon when it is
	// started, or `culvert doctor --fix`.
	Repairs []string `json:"repairs,omitempty"`
	// Actions are what `culvert doctor --fix` can do about it besides.
	Actions []Action `json:"actions,omitempty"`
}

// Action is one step towards the fix.
type Action struct {
	Command string `json:"command"` // what a person would type
	// Others says that it changes what another program made, or its
	// configuration: it is done only if it is confirmed.
	Others bool         `json:"others,omitempty"`
	Do     func() error `json:"-"`
}

// Result is what one check came to.
type Result struct {
	Check string `json:"check"`
	Title string `json:"title"`
	// Seen says what was looked at and is well; empty if nothing is.
	Seen     string    `json:"seen,omitempty"`
	Findings []Finding `json:"findings"`
}

// Host is what the checks look at.
type Host struct {
	// Status is what the daemon says of itself; nil if none answers, and then
	// NoDaemon says why.
	Status   *api.Status
	NoDaemon error
	// Flaws are what a daemon that is started now would find, where none runs, and
	// Foreseen says whether enough is known to tell.
	Flaws    []host.Flaw
	Foreseen bool
	// CNI is why no pod can be added, from `culvert cni status`; empty if one can.
	CNI string
	// CNIFlaws are what an ADD would meet.
	CNIFlaws []Finding
	// SubnetFile is where the daemon writes subnet.env; empty if that is not known.
	SubnetFile string
	// Underlay is the interface of the tunnel's packets and what peers send to;
	// empty if that is not known.
	Underlay string
	Addrs    []netip.Addr
	// Endpoints are the store's, to be dialled: scheme://host:port.
	Endpoints []string
	// Port is the UDP port of the tunnel.
	Port uint16
	// Root is prepended to the paths of files, for tests; usually empty.
	Root string
}

func (h Host) path(p string) string { return filepath.Join(h.Root, p) }

// Check is one thing to examine. What it may find is in api.Checks.
type Check struct {
	// ID is what its findings have as their Check, unless they say otherwise.
	ID    string
	Title string
	// Run returns what is well, in a few words, and what is not.
	Run func(context.Context, Host) (seen string, findings []Finding)
}

// Checks are all of them, in the order in which one helps to understand the
// next.
func Checks() []Check {
	return []Check{
		{"privileges", "privileges", privileges},
		{"kernel", "kernel features", kernel},
		{"daemon", "node daemon", daemon},
		{"host-state", "this host, as a daemon would find it", state},
		{"store-latency", "store", store},
		{"port-taken", "tunnel port", port},
		{"duplicate-address", "underlay address", duplicate},
		{"leftovers", "other overlays", leftovers},
		{"network-manager", "network managers", managers},
		{"conntrack-full", "connection tracking", conntrack},
		{"neighbour-table", "neighbour table", neighbours},
		{"clock", "clock", clock},
		{"subnet-file", "subnet.env", subnetFile},
		{"cni", "container runtime", containers},
	}
}

// Examine runs the checks.
func Examine(ctx context.Context, h Host) []Result {
	var all []Result
	for _, c := range Checks() {
		r := Result{Check: c.ID, Title: c.Title}
		r.Seen, r.Findings = c.Run(ctx, h)
		for i := range r.Findings {
			if r.Findings[i].Check == "" {
				r.Findings[i].Check = c.ID
			}
		}
		slices.SortStableFunc(r.Findings, func(a, b Finding) int {
			if a.Severity == b.Severity {
				return 0
			}
			if a.Severity == Bad {
				return -1
			}
			return 1
		})
		all = append(all, r)
	}
	return all
}

func bad(fix, format string, args ...any) Finding {
	return Finding{Severity: Bad, Warning: api.Warning{Text: fmt.Sprintf(format, args...), Fix: fix}}
}

func risk(fix, format string, args ...any) Finding {
	return Finding{Severity: Risk, Warning: api.Warning{Text: fmt.Sprintf(format, args...), Fix: fix}}
}

// found is a warning as a finding, as bad as the list of checks says.
func found(w api.Warning) Finding {
	f := Finding{Severity: Bad, Warning: w}
	if api.CheckOf(w.Check).Risk {
		f.Severity = Risk
	}
	return f
}

// doing adds what can be done about a finding.
func (f Finding) doing(actions ...Action) Finding {
	f.Actions = append(f.Actions, actions...)
	return f
}

// setting is the action that sets a kernel setting.
func setting(key, value string) Action {
	return Action{Command: "sysctl -w " + strings.ReplaceAll(key, "/", ".") + "=" + value, Do: func() error { return host.SetSysctl(key, value) }}
}
