package encap

import "golang.org/x/sys/unix"

// ipip is the wire format of RFC 2003: an IPv4 header of protocol 4 right before an
// inner IPv4 packet. It has no header of its own, no ports, and no checksum over the
// payload. The outer header says all that there is to check (rawip.go).
type ipip struct{}

func (ipip) Name() string      { return "ipip" }
func (ipip) Protocol() uint8   { return unix.IPPROTO_IPIP }
func (ipip) HeaderLen() int    { return 0 }
func (ipip) SuperFrames() bool { return true }

func (ipip) Put([]byte, VTEP, VTEP, uint16) {}

func (ipip) Check([]byte, *VTEP) (etherType uint16, r Reason) { return etherTypeIPv4, Accepted }
