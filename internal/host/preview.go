package host

import (
	"fmt"
	"slices"
	"strings"

	"culvert/internal/api"
	"culvert/internal/firewall"
	"culvert/internal/names"
)

// Problem is a difference between the host and a plan, or an obstacle.
type Problem struct {
	api.Warning
	// Repairs are the changes a Keeper would make; none if culvert cannot fix
	// it.
	Repairs []Change
	// Do applies the Fix to another program's object; nil if that is not
	// possible.
	Do func() error
}

// Preview returns what a Keeper with this plan would find, and the state that
// it wants, without changing anything:
//
//	kernel ── read ── View ── Plan ── State ── diff ── steps ── Problems
func Preview(underlay int, p Planner) ([]Problem, State, error) {
	have, want, err := look(underlay, p)
	if err != nil {
		return nil, want, err
	}
	problems := settingProblems(diff(have, want))
	problems = append(problems, deviceProblems(have, want)...)
	problems = append(problems, firewallProblems(have, want)...)
	for _, w := range append(have.astray(want), new(podBridges).cutOff(have, want)...) {
		problems = append(problems, Problem{Warning: w})
	}
	_, routes := foreignRoutes(have, want)
	for _, w := range routes {
		f := Problem{Warning: w}
		for _, r := range have.foreign {
			if w.Fix == "ip route del "+r.String() {
				f.Do = r.delete
			}
		}
		problems = append(problems, f)
	}
	return problems, want, nil
}

// Repair makes the kernel equal to what the plan wants, once, as a Keeper does, and
// returns what it changed. It does not change the fast path and calls no Followers.
func Repair(underlay int, p Planner) ([]Change, error) {
	have, want, err := look(underlay, p)
	if err != nil {
		return nil, err
	}
	return write(have, withoutFastPath(diff(have, want)))
}

// look reads the kernel and runs the plan.
func look(underlay int, p Planner) (have reading, want State, err error) {
	others := &survey{}
	if have, err = read(underlay, others); err != nil {
		return have, want, err
	}
	if want, err = p(have.view); err != nil {
		return have, want, err
	}
	others.end()
	err = others.within(want.Firewall.Forward)
	have.foreign = others.foreign
	var bridges podBridges
	for range 2 { // the routes have just been read
		have.podBridges = bridges.find(have, want, others.leads)
	}
	return have, want, err
}

// withoutFastPath removes the steps that concern the fast path: only the daemon
// knows whether it is wanted.
func withoutFastPath(steps []step) []step {
	return slices.DeleteFunc(steps, func(s step) bool {
		return s.Kind == KindFastPath || strings.HasPrefix(s.Command, "ip link del "+names.JoinNear) || strings.HasPrefix(s.Command, "ip link del "+names.JoinFar)
	})
}

// settingProblems turns steps into problems: one per kernel setting, because each has
// its own effect, and one per kind for the rest.
func settingProblems(steps []step) []Problem {
	var problems []Problem
	byKind := make(map[Kind][]Change)
	remade := make(map[string]bool) // devices to be created: their settings are not reported
	for _, s := range withoutFastPath(steps) {
		switch {
		case s.caution || s.Kind == KindForward:
		case s.Kind == KindSysctl && remade[s.link]:
		case s.Kind == KindSysctl:
			problems = append(problems, settingProblem(s.Change))
		default:
			if strings.HasPrefix(s.Command, "ip link add ") {
				remade[s.link] = true
			}
			byKind[s.Kind] = append(byKind[s.Kind], s.Change)
		}
	}
	for _, kind := range Kinds() {
		changes := byKind[kind]
		if len(changes) == 0 {
			continue
		}
		text := map[Kind]string{
			KindLink: "culvert's devices are", KindAddress: "the addresses of culvert's devices are", KindRoute: "culvert's routes are",
			KindNeighbour: "the neighbours of culvert's device are", KindFDB: "the FDB of culvert's device is", KindNFTables: "culvert's nftables table is",
		}[kind]
		text += " not as the leases require"
		if kind == KindPods {
			text = "the pods' bridge is not as the CNI plugin made it: packets do not reach pods"
		}
		problems = append(problems, Problem{
			Warning: api.Warning{Check: "host-" + string(kind), Text: text, Fix: someCommands(changes)},
			Repairs: changes,
		})
	}
	return problems
}

// someCommands returns the first commands of changes.
func someCommands(changes []Change) string {
	const most = 3
	commands := Commands(changes)
	if len(commands) <= most {
		return strings.Join(commands, "; ")
	}
	return fmt.Sprintf("%s; and %d more", strings.Join(commands[:most], "; "), len(commands)-most)
}

// settingProblem describes the effect of a kernel setting on packets. The setting
// is that of the step's command, in sysctl(8) syntax.
func settingProblem(c Change) Problem {
	setting := strings.TrimPrefix(c.Command, "sysctl -w ")
	key, want, _ := strings.Cut(setting, "=")
	w := api.Warning{Check: "sysctl", Text: fmt.Sprintf("%s is not %s", key, want), Fix: c.Command}
	switch {
	case strings.HasSuffix(key, "forwarding") || strings.HasSuffix(key, ".ip_forward"):
		w.Check = "forwarding-off"
		w.Text += ": this host does not forward packets of pods"
	case strings.HasSuffix(key, ".accept_ra"):
		w.Check = "router-advertisements"
		w.Text += ": the kernel drops the default route from router advertisements while forwarding is on"
	case strings.HasSuffix(key, ".rp_filter"):
		w.Check = "reverse-path-filter"
		w.Text += ": packets of peers are dropped if the route back uses another device"
	case strings.HasSuffix(key, ".disable_ipv6"):
		w.Check = "ipv6-off"
		w.Text += ": culvert's device cannot have an IPv6 address"
	}
	return Problem{Warning: w, Repairs: []Change{c}}
}

// deviceProblems reports vxlan devices whose outer source is not the published
// address, which peers do not accept.
func deviceProblems(have reading, want State) []Problem {
	var problems []Problem
	for _, w := range want.Links {
		i := slices.IndexFunc(have.Links, func(h Link) bool { return h.Name == w.Name })
		if i < 0 || w.VXLAN == nil || have.Links[i].VXLAN == nil {
			continue
		}
		if h := have.Links[i].VXLAN; h.Local != w.VXLAN.Local {
			problems = append(problems, Problem{Warning: api.Warning{
				Check: "outer-source",
				Text:  fmt.Sprintf("%s sends from %s, but this node's lease has %s: peers drop packets from other addresses", w.Name, h.Local, w.VXLAN.Local),
				Fix:   "ip link del " + w.Name + "; " + w.addCommand(),
			}})
		}
	}
	return problems
}

// firewallProblems returns other programs' drops, whether or not an accept of culvert's
// would prevent them.
func firewallProblems(have reading, want State) []Problem {
	var problems []Problem
	for _, f := range firewall.Problems(have.firewall, want.Firewall, have.podDevices(want)) {
		problem := Problem{Warning: f.Warning}
		for _, s := range f.Repairs {
			problem.Repairs = append(problem.Repairs, firewallChange(s))
		}
		if problem.Fix == "" {
			problem.Fix = someCommands(problem.Repairs)
		}
		problems = append(problems, problem)
	}
	return problems
}
