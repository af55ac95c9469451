package api

import (
	"bytes"
	"slices"
	"sync"
)

// Ring keeps the last lines written to it: the daemon's log, which its socket serves. It
// is safe for concurrent use.
type Ring struct {
	mu   sync.Mutex
	text []byte
}

// ringMost is how many bytes a Ring keeps.
const ringMost = 512 << 10

// Write keeps p, one or several lines.
func (r *Ring) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.text = append(r.text, p...)
	if len(r.text) > 2*ringMost { // rarely, not for each line
		r.text = slices.Clone(r.last())
	}
	return len(p), nil
}

// last returns the end of the text, from the start of a line.
func (r *Ring) last() []byte {
	if len(r.text) <= ringMost {
		return r.text
	}
	end := r.text[len(r.text)-ringMost:]
	if i := bytes.IndexByte(end, '\n'); i >= 0 {
		end = end[i+1:]
	}
	return end
}

// Bytes returns the last lines.
func (r *Ring) Bytes() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.last())
}
