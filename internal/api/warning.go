package api

import (
	"cmp"
	"slices"
)

// Warning is a condition that prevents packets from being forwarded, or may do so,
// with its evidence and remedy.
type Warning struct {
	// Check identifies the condition for scripts and metrics, in kebab case, such
	// as "forward-drop". It does not change between versions.
	Check string `json:"check"`
	// Text says what is wrong and where it was observed.
	Text string `json:"text"`
	// Fix is the command or setting that fixes it; empty if there is none.
	Fix string `json:"fix,omitempty"`
}

// String returns the text and the fix on one line.
func (w Warning) String() string {
	if w.Fix == "" {
		return w.Text
	}
	return w.Text + ": " + w.Fix
}

// SortWarnings sorts by check, then by text, and removes duplicates.
func SortWarnings(all []Warning) []Warning {
	slices.SortFunc(all, func(a, b Warning) int {
		return cmp.Or(cmp.Compare(a.Check, b.Check), cmp.Compare(a.Text, b.Text), cmp.Compare(a.Fix, b.Fix))
	})
	return slices.Compact(all)
}
