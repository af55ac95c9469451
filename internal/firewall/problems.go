package firewall

import (
	"slices"

	"culvert/internal/api"
)

// CheckInput is the check of the warning about a rule that drops the tunnel's own
// packets.
const CheckInput = "input-drop"

// Problem is a rule of another program that drops packets, or one of ours that is not
// where it is needed.
type Problem struct {
	api.Warning
	// Repairs are the steps of Diff that fix it, if Fix is empty; none if culvert cannot.
	Repairs []Step
}

// Problems returns other programs' drops, whether or not an accept of culvert's would
// prevent them.
func Problems(have Reading, want Policy, d Devices) []Problem {
	var problems []Problem
	repairs, warnings := diffOthers(have.others, want, d)
	for _, w := range warnings {
		problems = append(problems, Problem{Warning: w})
	}
	if len(repairs) == 0 {
		return problems
	}
	named := false
	for _, p := range want.passages(d) {
		found := p.findings(have.others.set)
		at, ok := have.others.spot(p, found)
		if !ok || !at.missing(have.others, p) {
			continue
		}
		for _, f := range found {
			if !f.certain || !at.covers(f) {
				continue
			}
			problems = append(problems, Problem{Warning: p.warning(f), Repairs: repairs})
			named = true
			break // the same rule drops the passage's other packets
		}
	}
	if !named { // superfluous, or needed only if another rule is added
		problems = append(problems, Problem{
			Warning: api.Warning{Check: "host-forward", Text: "culvert's accept rules in other programs' chains are missing or misplaced"},
			Repairs: repairs,
		})
	}
	return problems
}

// missing reports whether one of the passage's accepts is not at the spot.
func (s spot) missing(o otherRules, p passage) bool {
	return slices.ContainsFunc(p.accepts, func(a accept) bool {
		return !slices.ContainsFunc(o.ours, func(r ourRule) bool { return s.holds(r) && r.text == a.text })
	})
}
