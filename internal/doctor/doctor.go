// Package doctor examines a host for whatever prevents culvert's packets from
// passing, with or without a running daemon. Its findings include the warnings
// of a running daemon and what a daemon would find at its start (host.Preview),
// with the same check IDs; api.Checks lists them all. It keeps no state and
// fixes nothing by itself: fixes come with a finding as Actions. It only
// creates and deletes a probe device (host.Supports), and sends probes.
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

// Severity is the effect of a finding on packets.
type Severity string

const (
	// Bad means that packets do not pass, or pods cannot be added, now.
	Bad Severity = "bad"
	// Risk means that this can happen: under load, after a reboot, or when
	// another program acts.
	Risk Severity = "risk"
)

// Finding is a problem that a check found: check ID, evidence, fix and
// severity.
type Finding struct {
	Severity Severity `json:"severity"`
	api.Warning
	// Repairs are the commands that culvert would apply itself: the daemon when
	// it starts, or `culvert doctor --fix`.
	Repairs []string `json:"repairs,omitempty"`
	// Actions are what `culvert doctor --fix` can do in addition.
	Actions []Action `json:"actions,omitempty"`
}

// Action is one step of a fix.
type Action struct {
	Command string `json:"command"` // the equivalent shell command
	// Others is set if the action changes another program's object or
	// configuration; it then needs confirmation.
	Others bool         `json:"others,omitempty"`
	Do     func() error `json:"-"`
}

// Result is the outcome of one check.
type Result struct {
	Check string `json:"check"`
	Title string `json:"title"`
	// Seen summarizes what was checked and is fine; empty if there are findings
	// only.
	Seen     string    `json:"seen,omitempty"`
	Findings []Finding `json:"findings"`
}

// Host is the input of the checks.
type Host struct {
	// Status is the daemon's status; nil if no daemon answers, and NoDaemon is
	// the reason.
	Status   *api.Status
	NoDaemon error
	// Problems are what a daemon would find if it were started now, if none runs.
	// Foreseen is set if enough is known to tell.
	Problems []host.Problem
	Foreseen bool
	// CNI is why no pod can be added, from `culvert cni status`; empty if pods
	// can.
	CNI string
	// CNIProblems are problems that a CNI ADD would run into.
	CNIProblems []Finding
	// SubnetFile is the path of subnet.env; empty if unknown.
	SubnetFile string
	// Underlay is the underlay's interface and Addrs the addresses that peers
	// send to; empty if unknown.
	Underlay string
	Addrs    []netip.Addr
	// Endpoints are the store's endpoints: scheme://host:port.
	Endpoints []string
	// Port is the tunnel's UDP port.
	Port uint16
	// Root is prepended to file paths, for tests; usually empty.
	Root string
}

func (h Host) path(p string) string { return filepath.Join(h.Root, p) }

// Check is one check. api.Checks lists its possible findings.
type Check struct {
	// ID is the Check of its findings that do not set their own.
	ID    string
	Title string
	// Run summarizes what is fine, and returns findings.
	Run func(context.Context, Host) (seen string, findings []Finding)
}

// Checks returns all checks, ordered so that earlier ones help to understand
// later ones.
func Checks() []Check {
	return []Check{
		{"privileges", "privileges", privileges},
		{"kernel", "kernel features", kernel},
		{"daemon", "node daemon", daemon},
		{"host-state", "host state", state},
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

// found converts a warning to a finding, with the severity from api.Checks.
func found(w api.Warning) Finding {
	f := Finding{Severity: Bad, Warning: w}
	if api.CheckOf(w.Check).Risk {
		f.Severity = Risk
	}
	return f
}

// doing adds actions to a finding.
func (f Finding) doing(actions ...Action) Finding {
	f.Actions = append(f.Actions, actions...)
	return f
}

// setting returns the action that sets a kernel setting.
func setting(key, value string) Action {
	return Action{Command: "sysctl -w " + strings.ReplaceAll(key, "/", ".") + "=" + value, Do: func() error { return host.SetSysctl(key, value) }}
}
