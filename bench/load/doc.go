// Package load is the generator of the benchmarks' traffic, and its measure:
// TCP streams, UDP datagrams, requests and connections between two ends.
//
// One end listens (Local, or Remote on another machine) and the others dial, one
// or more:
//
//	near ends                                 far end
//	Streams, Datagrams, Requests, ...         Local.Open -> Session
//	  socket in its place  ── the datapath ──  socket in its place
//	                                          Session.Reading: what came, and when
//
// What is counted is what a receiver got, between two of its own readings.
// Each socket has a thread of its own that makes plain blocking system calls;
// datagrams go one per call and without UDP_SEGMENT, so that batching, if there
// is any, is the datapath's. Nothing is allocated while traffic runs.
package load
