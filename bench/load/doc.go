// Package load generates the benchmarks' traffic and measures it: TCP streams, UDP
// datagrams, requests and connections. It does not set up the network between the
// ends and writes no reports; package bench does. It owns its sockets and threads,
// which live until the caller closes a session or a sender.
//
// One end listens (Local, or bench.Remote on another machine) and one or more dial:
//
//	near ends                                 far end
//	Streams, Datagrams, Requests, ...         Local.Open -> Session
//	  socket in its Place  ── the datapath ──  socket in its Place
//	                                          Session.Reading: what was received, and when
//
// Rates are computed from what a receiver got between two readings by its own clock.
// Each socket has one thread, which makes plain blocking system calls. Datagrams are
// sent one per call and without UDP_SEGMENT, so that any batching is the datapath's.
// Nothing is allocated while traffic runs.
package load
