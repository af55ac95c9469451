// Package doctor examines a host for what keeps culvert's packets from passing,
// with or without a running daemon. It changes nothing. What a running daemon
// warns of is part of what it finds, under the same check ids; the daemon owns
// those, and this package owns the checks in Checks.
package doctor

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"

	"culvert/internal/api"
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
	// CNI is why no pod can be added, from `culvert cni status`; empty if one can.
	CNI string
	// Endpoints are the store's, to be dialled: scheme://host:port.
	Endpoints []string
	// Port is the UDP port of the tunnel.
	Port uint16
	// Root is prepended to the paths of files, for tests; usually empty.
	Root string
}

func (h Host) path(p string) string { return filepath.Join(h.Root, p) }

// Check is one thing to examine.
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
		{"store-latency", "store", store},
		{"port-taken", "tunnel port", port},
		{"leftovers", "other overlays", leftovers},
		{"network-manager", "network managers", managers},
		{"conntrack-full", "connection tracking", conntrack},
		{"neighbour-table", "neighbour table", neighbours},
		{"clock", "clock", clock},
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
	return Finding{Bad, api.Warning{Text: fmt.Sprintf(format, args...), Fix: fix}}
}

func risk(fix, format string, args ...any) Finding {
	return Finding{Risk, api.Warning{Text: fmt.Sprintf(format, args...), Fix: fix}}
}
