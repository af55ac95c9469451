package encap

import "golang.org/x/sys/unix"

// fault classifies an errno of the loop's system calls.
type fault uint8

const (
	// faultGone: the device or socket was removed. Run returns, and its caller
	// reopens both.
	faultGone fault = iota
	// faultDry: nothing to read now.
	faultDry
	// faultAgain: interrupted; repeat the call.
	faultAgain
	// faultPast: transient, or about an earlier packet. Nothing of this call is
	// counted as dropped.
	faultPast
	// faultCounted: the packet is lost and counted under the outcome's Reason.
	faultCounted
	// faultRefused: the kernel rejects a batching mechanism, not the packets; send
	// them without it.
	faultRefused
	// faultFatal: a bug in the loop. Run returns.
	faultFatal
)

// outcome is how the loop handles an errno.
type outcome struct {
	fault  fault
	reason Reason // for faultCounted, and for faultRefused if the packet is lost anyway
}

// outcomes maps an errno to its outcome; key 0 is the default.
type outcomes map[unix.Errno]outcome

func (t outcomes) of(errno unix.Errno) outcome {
	if o, ok := t[errno]; ok {
		return o
	}
	return t[0]
}

// The errno tables, one per system call. Kernel sources: drivers/net/tun.c,
// net/packet/af_packet.c, net/ipv4/udp.c, raw.c and ip_output.c, their IPv6
// counterparts, and icmp_err_convert.
var (
	// deviceRead: read(2) from the TUN device.
	deviceRead = outcomes{
		0:           {fault: faultGone},
		unix.EAGAIN: {fault: faultDry},
		unix.EINTR:  {fault: faultAgain},
		unix.ENOMEM: {fault: faultDry}, // retried at the next poll
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
		// Some kernels reject GSO frames (Linux 6.6.44, 6.10.3). A single packet is
		// lost.
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
		// A packet socket's link was set down; the socket works again once it is up.
		unix.ENETDOWN: {fault: faultPast},
		// ICMP errors about earlier packets: icmp_err_convert in net/ipv4/icmp.c,
		// icmpv6_err_convert in net/ipv6/icmp.c.
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
		// Before Linux 6.2 a packet socket cannot describe a UDP GSO frame and drops
		// it. Only links that carry such frames unsegmented, such as veth, are
		// affected.
		unix.EINVAL: {faultCounted, IngressUncut},
		unix.ENODEV: {fault: faultGone}, // a packet socket's link was deleted
		unix.EBADF:  {fault: faultFatal},
		unix.EFAULT: {fault: faultFatal},
	}
	// socketSend: sendmmsg(2) to a UDP or raw socket, after one retry, since the
	// first errno may be about an earlier packet.
	socketSend = outcomes{
		0:                  {faultCounted, EgressSend}, // a firewall may return any errno
		unix.EINTR:         {fault: faultAgain},
		unix.EAGAIN:        {faultCounted, EgressFull},
		unix.ENOBUFS:       {faultCounted, EgressNoBuffers}, // the link's queue is full, or memory is short
		unix.ENOMEM:        {faultCounted, EgressNoBuffers},
		unix.EMSGSIZE:      {faultCounted, EgressTooBig},
		unix.ENETUNREACH:   {faultCounted, EgressUnreachable}, // no route: the link is down, or was
		unix.EHOSTUNREACH:  {faultCounted, EgressUnreachable},
		unix.ENETDOWN:      {faultCounted, EgressUnreachable},
		unix.EHOSTDOWN:     {faultCounted, EgressUnreachable},
		unix.EADDRNOTAVAIL: {faultCounted, EgressUnreachable}, // our address is not on the link
		unix.ENODEV:        {faultCounted, EgressUnreachable},
		unix.ENXIO:         {faultCounted, EgressUnreachable},
		unix.EPERM:         {faultCounted, EgressDenied}, // a firewall's output chain
		unix.EACCES:        {faultCounted, EgressDenied}, // a prohibit route
		unix.EINVAL:        {faultCounted, EgressSend},   // our address is gone, or a blackhole route
		unix.EIO:           {faultCounted, EgressSend},
		unix.ECONNREFUSED:  {faultCounted, EgressSend}, // two ICMP errors in a row
		unix.ENOPROTOOPT:   {faultCounted, EgressSend},
		unix.EPROTO:        {faultCounted, EgressSend},
		unix.ENONET:        {faultCounted, EgressSend},
		unix.EOPNOTSUPP:    {faultCounted, EgressSend},
		unix.EBADF:         {fault: faultFatal},
		unix.ENOTSOCK:      {fault: faultFatal},
		unix.EFAULT:        {fault: faultFatal},
	}
	// superWrite: write(2) to the Super device. Frames that it rejects leave by the
	// sockets and are counted there.
	superWrite = outcomes{
		0:             {fault: faultGone}, // until the uplink's watcher enables it again
		unix.EINTR:    {fault: faultAgain},
		unix.EAGAIN:   {fault: faultPast},
		unix.ENOBUFS:  {fault: faultPast},
		unix.ENOMEM:   {fault: faultPast},
		unix.EINVAL:   {fault: faultRefused},
		unix.EMSGSIZE: {fault: faultRefused},
	}
)
