package encap

import "golang.org/x/sys/unix"

// fault is what an errno of one of the loop's system calls means.
type fault uint8

const (
	// faultGone: somebody took the device or the socket away. Run returns, and
	// whoever called it opens all of it anew.
	faultGone fault = iota
	// faultDry says that there is nothing to read for now.
	faultDry
	// faultAgain says nothing about the call: it is to be made again.
	faultAgain
	// faultPast is about something sent earlier, or about a link that is down
	// for now. The kernel says it once.
	faultPast
	// faultCounted loses the packet, which is counted under the outcome's Reason.
	faultCounted
	// faultRefused refuses a batching mechanism, not the packets: they go on
	// without it.
	faultRefused
	// faultFatal is a mistake of the loop's own.
	faultFatal
)

// outcome is what is done about an errno.
type outcome struct {
	fault  fault
	reason Reason // of faultCounted, and of faultRefused if the packet is lost all the same
}

// outcomes is a table of errno; that of 0 is the outcome of all that are not
// named.
type outcomes map[unix.Errno]outcome

func (t outcomes) of(errno unix.Errno) outcome {
	if o, ok := t[errno]; ok {
		return o
	}
	return t[0]
}

// The tables of errno, one for each direction and descriptor. The sources are
// the kernel's: drivers/net/tun.c, net/packet/af_packet.c, net/ipv4/udp.c, raw.c
// and ip_output.c, their IPv6 counterparts, and icmp_err_convert.
var (
	// deviceRead: read(2) from the TUN device.
	deviceRead = outcomes{
		0:           {fault: faultGone},
		unix.EAGAIN: {fault: faultDry},
		unix.EINTR:  {fault: faultAgain},
		unix.ENOMEM: {fault: faultDry}, // the next look may find memory
		unix.EBADF:  {fault: faultFatal},
		unix.EFAULT: {fault: faultFatal},
		unix.EINVAL: {fault: faultFatal}, // the buffer is too short for a header
		unix.EBADFD: {fault: faultGone},  // the device was deleted
	}
	// deviceWrite: writev(2) to the TUN device.
	deviceWrite = outcomes{
		0:            {faultCounted, IngressWrite},
		unix.EINTR:   {fault: faultAgain},
		unix.EAGAIN:  {faultCounted, IngressWrite},
		unix.ENOMEM:  {faultCounted, IngressNoBuffers},
		unix.ENOBUFS: {faultCounted, IngressNoBuffers},
		unix.EIO:     {faultCounted, IngressDown}, // the device is set down
		// Of a large frame: some kernels take none (Linux 6.6.44, 6.10.3). Of a
		// single packet: it is none that the device takes.
		unix.EINVAL: {faultRefused, IngressWrite},
		unix.EBADFD: {fault: faultGone},
		unix.EBADF:  {fault: faultFatal},
		unix.EFAULT: {fault: faultFatal},
	}
	// socketReceive: recvmmsg(2) from a UDP or packet socket.
	socketReceive = outcomes{
		0:           {fault: faultGone},
		unix.EAGAIN: {fault: faultDry},
		unix.EINTR:  {fault: faultDry},
		unix.ENOMEM: {fault: faultDry},
		// A packet socket's link was set down; up again, it goes on by itself.
		unix.ENETDOWN: {fault: faultPast},
		// ICMP errors about something sent earlier: icmp_err_convert in
		// net/ipv4/icmp.c, icmpv6_err_convert in net/ipv6/icmp.c.
		unix.ECONNREFUSED: {fault: faultPast},
		unix.EHOSTUNREACH: {fault: faultPast},
		unix.ENETUNREACH:  {fault: faultPast},
		unix.EMSGSIZE:     {fault: faultPast},
		unix.ENOPROTOOPT:  {fault: faultPast},
		unix.EPROTO:       {fault: faultPast},
		unix.EACCES:       {fault: faultPast},
		unix.EHOSTDOWN:    {fault: faultPast},
		unix.ENONET:       {fault: faultPast},
		unix.EOPNOTSUPP:   {fault: faultPast},
		// A packet socket before Linux 6.2 cannot say how a UDP super-frame is cut,
		// and has thrown it away. Only links that carry such frames whole, as veth
		// does, show it.
		unix.EINVAL: {faultCounted, IngressUncut},
		unix.ENODEV: {fault: faultGone}, // a packet socket's link was deleted
		unix.EBADF:  {fault: faultFatal},
		unix.EFAULT: {fault: faultFatal},
	}
	// socketSend: sendmmsg(2) to a UDP or raw socket, after a second try. The
	// first errno may be about something sent earlier (faultPast above).
	socketSend = outcomes{
		0:                  {faultCounted, EgressSend}, // a firewall may say anything
		unix.EINTR:         {fault: faultAgain},
		unix.EAGAIN:        {faultCounted, EgressFull},
		unix.ENOBUFS:       {faultCounted, EgressNoBuffers}, // the link's queue is full, or memory is short
		unix.ENOMEM:        {faultCounted, EgressNoBuffers},
		unix.EMSGSIZE:      {faultCounted, EgressTooBig},
		unix.ENETUNREACH:   {faultCounted, EgressUnreachable}, // no route: the link is down, or was
		unix.EHOSTUNREACH:  {faultCounted, EgressUnreachable},
		unix.ENETDOWN:      {faultCounted, EgressUnreachable},
		unix.EHOSTDOWN:     {faultCounted, EgressUnreachable},
		unix.EADDRNOTAVAIL: {faultCounted, EgressUnreachable}, // our address is not on the link, for now
		unix.ENODEV:        {faultCounted, EgressUnreachable},
		unix.ENXIO:         {faultCounted, EgressUnreachable},
		unix.EPERM:         {faultCounted, EgressDenied}, // a firewall's output chain
		unix.EACCES:        {faultCounted, EgressDenied}, // a prohibit route
		unix.EINVAL:        {faultCounted, EgressSend},   // our address is gone, or a blackhole route
		unix.EIO:           {faultCounted, EgressSend},
		unix.ECONNREFUSED:  {faultCounted, EgressSend}, // ICMP errors, one after the other
		unix.ENOPROTOOPT:   {faultCounted, EgressSend},
		unix.EPROTO:        {faultCounted, EgressSend},
		unix.ENONET:        {faultCounted, EgressSend},
		unix.EOPNOTSUPP:    {faultCounted, EgressSend},
		unix.EBADF:         {fault: faultFatal},
		unix.ENOTSOCK:      {fault: faultFatal},
		unix.EFAULT:        {fault: faultFatal},
	}
	// superWrite: write(2) to the TAP device that takes super-frames. What it does
	// not take leaves by the sockets, and is counted there.
	superWrite = outcomes{
		0:             {fault: faultGone}, // until whoever watches the uplink has looked
		unix.EINTR:    {fault: faultAgain},
		unix.EAGAIN:   {fault: faultPast},
		unix.ENOBUFS:  {fault: faultPast},
		unix.ENOMEM:   {fault: faultPast},
		unix.EINVAL:   {fault: faultRefused},
		unix.EMSGSIZE: {fault: faultRefused},
	}
)
