package api

import (
	"bytes"
	"slices"
	"sync"
)

// Ring keeps the last lines written to it: the daemon's log, which its socket serves. It
// takes all its memory at the first Write; a page of it becomes resident once text reaches
// it. It is safe for concurrent use.
type Ring struct {
	mu   sync.Mutex
	text []byte // of ringMost bytes, or nil
	next int    // where in text the next byte goes
	full bool   // text from next on is older than text before it
}

// ringMost is how many bytes a Ring keeps.
const ringMost = 512 << 10

// Write keeps p, one or several lines.
func (r *Ring) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.text == nil {
		r.text = make([]byte, ringMost)
	}
	for rest := p; len(rest) > 0; {
		n := copy(r.text[r.next:], rest)
		rest = rest[n:]
		if r.next += n; r.next == ringMost {
			r.next, r.full = 0, true
		}
	}
	return len(p), nil
}

// Bytes returns the last lines.
func (r *Ring) Bytes() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.full {
		return slices.Clone(r.text[:r.next])
	}
	text := slices.Concat(r.text[r.next:], r.text[:r.next])
	if i := bytes.IndexByte(text, '\n'); i >= 0 { // the rest of a line that is overwritten
		text = text[i+1:]
	}
	return text
}
