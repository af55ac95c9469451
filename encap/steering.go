package encap

import "sync/atomic"

// Steering is the page that the loop shares with the program that steers flows between a
// thread's queues of the device: the first is for sparse flows, the others are for bulk.
// A flow must not overtake itself when it moves.
//
// To bulk: the program counts the move before the flow's first packet goes to another
// queue, and the loop drains the first queue before it sends from another.
//
// Back: the loop counts its turns at each queue. The program notes the turn in which a
// flow's last packet went to a queue, and moves the flow back after the queue was empty at
// the end of a later turn.
type Steering struct {
	Moves atomic.Uint64 // flows that became bulk
	_     uint64
	Turns [SteeredQueues]Turns // by queue of the device
}

// SteeredQueues is how many queues a program can steer to.
const SteeredQueues = 255

// Turns are a queue's turns, which the loop counts.
type Turns struct {
	Begun atomic.Uint64 // how many have begun
	Dry   atomic.Uint64 // the last one that ended with the queue empty, and all of it sent
}
