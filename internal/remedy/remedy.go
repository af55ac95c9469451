// Package remedy has errors with two separate parts, what went wrong and what to do about
// it, so that a terminal shows two lines and a log one. It neither prints nor decides
// anything, and keeps no state.
package remedy

import (
	"errors"
	"fmt"
	"strings"
)

// Error is an error with its remedy.
type Error struct {
	Err error
	Do  string // what to do, as an instruction
}

// Errorf returns an error with a remedy. Format and args are those of fmt.Errorf.
func Errorf(do, format string, args ...any) error {
	return &Error{fmt.Errorf(format, args...), do}
}

// Error returns both parts on one line.
func (e *Error) Error() string { return e.Err.Error() + separator + e.Do }

// Unwrap returns the error without its remedy.
func (e *Error) Unwrap() error { return e.Err }

const separator = ": "

// Split returns what went wrong and what to do; do is empty if err says nothing about it.
// The remedy may be that of a wrapped error.
func Split(err error) (what, do string) {
	what = err.Error()
	if e, ok := errors.AsType[*Error](err); ok {
		if before, after, found := strings.Cut(what, separator+e.Do); found {
			return before + after, e.Do
		}
	}
	return what, ""
}
