package subnet

import "context"

// Signal wakes one receiver, which then checks what has changed. Signals are combined
// until it receives one.
type Signal chan struct{}

// NewSignal returns a Signal.
func NewSignal() Signal { return make(Signal, 1) }

// Raise signals the receiver. It never blocks.
func (s Signal) Raise() {
	select {
	case s <- struct{}{}:
	default:
	}
}

// Lock is a mutex for operations of several requests. Waiting for it ends with the
// context.
type Lock chan struct{}

// NewLock returns an unlocked Lock.
func NewLock() Lock { return make(Lock, 1) }

// Take locks it and returns the function that unlocks it, or ctx's error if ctx ends
// first.
func (l Lock) Take(ctx context.Context) (release func(), err error) {
	select {
	case l <- struct{}{}:
		return func() { <-l }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
