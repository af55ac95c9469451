package doctor

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/host"
)

// duplicate checks whether another host on the underlay's link has this node's
// address. For IPv6 the kernel itself detects duplicates when an address is
// added (RFC 4862, 5.4) and flags those that failed.
func duplicate(ctx context.Context, h Host) (string, []Finding) {
	if h.Underlay == "" {
		return "not known", nil
	}
	facts, err := host.ReadFacts()
	if err != nil {
		return "", []Finding{risk("", "%v", err)}
	}
	var all []Finding
	var seen []string
	const fix = "give one of the two machines another address"
	for _, a := range h.Addrs {
		if !facts.HasAddrs([]netip.Addr{a}) {
			continue // behind NAT; or missing, which other checks report
		}
		if a.Is6() {
			for _, f := range facts.Addrs {
				if f.Prefix.Addr() == a && f.Duplicate && h.Status == nil { // else the daemon warns of it
					all = append(all, bad(fix, "the kernel found %s on another machine of the link, and does not use it", a))
				}
			}
			continue
		}
		mac, err := arpProbe(ctx, h.Underlay, a, probeTimeout)
		switch {
		case err != nil:
			all = append(all, risk("", "ARP probe for %[2]s on %[1]s: %[3]v", h.Underlay, a, err))
		case mac != nil && isGateway(mac): // a router with proxy ARP
			seen = append(seen, fmt.Sprintf("%s (a gateway answers for it)", a))
		case mac != nil:
			all = append(all, bad(fix, "%s is this node's address on %s, and %s answers for it too: packets of peers go to either", a, h.Underlay, mac))
		default:
			seen = append(seen, a.String()+": no other machine has it")
		}
	}
	if len(all) > 0 {
		return "", all
	}
	if len(seen) == 0 {
		return "not asked", nil
	}
	return strings.Join(seen, ", "), nil
}

// probeTimeout is how long to wait for a reply to each of two probes.
const probeTimeout = 100 * time.Millisecond

// isGateway reports whether a MAC is that of a default route's gateway.
func isGateway(mac net.HardwareAddr) bool {
	f, err := host.ReadFacts()
	if err != nil {
		return false
	}
	neighbours, err := host.Retry(func() ([]netlink.Neigh, error) { return netlink.NeighList(0, netlink.FAMILY_V4) })
	if err != nil {
		return false
	}
	for _, n := range neighbours {
		if !bytes.Equal(n.HardwareAddr, mac) {
			continue
		}
		for _, r := range f.Routes {
			if r.To.Bits() == 0 && r.Via.IsValid() && n.IP.Equal(r.Via.AsSlice()) {
				return true
			}
		}
	}
	return false
}

// arpProbe sends ARP probes (RFC 5227, 2.1.1), whose sender address is zero. It
// returns the Ethernet address of a host that claims a; nil if none does.
func arpProbe(ctx context.Context, link string, a netip.Addr, timeout time.Duration) (net.HardwareAddr, error) {
	dev, err := net.InterfaceByName(link)
	if err != nil {
		return nil, err
	}
	if len(dev.HardwareAddr) != 6 {
		return nil, nil // no Ethernet, so no ARP
	}
	protocol := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ARP))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(protocol))
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: dev.Index}); err != nil {
		return nil, err
	}
	request := []byte{0, 1, 8, 0, 6, 4, 0, 1} // Ethernet, IPv4, address lengths, request
	request = append(request, dev.HardwareAddr...)
	request = append(request, 0, 0, 0, 0) // sender address zero
	request = append(request, make([]byte, 6)...)
	request = append(request, a.AsSlice()...)
	to := &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: dev.Index, Halen: 6, Addr: [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}
	answer := make([]byte, 128)
	for range 2 {
		if err := unix.Sendto(fd, request, 0, to); err != nil {
			return nil, err
		}
		for end := time.Now().Add(timeout); time.Now().Before(end) && ctx.Err() == nil; {
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			if _, err := unix.Poll(fds, int(max(time.Until(end).Milliseconds(), 1))); err != nil && !errors.Is(err, unix.EINTR) {
				return nil, err
			}
			n, from, err := unix.Recvfrom(fd, answer, unix.MSG_DONTWAIT)
			if err != nil || n < 28 {
				continue
			}
			ll, ok := from.(*unix.SockaddrLinklayer)
			if !ok || ll.Pkttype == unix.PACKET_OUTGOING {
				continue
			}
			sender := net.HardwareAddr(bytes.Clone(answer[8:14]))
			if bytes.Equal(answer[14:18], a.AsSlice()) && !bytes.Equal(sender, dev.HardwareAddr) {
				return sender, nil
			}
		}
	}
	return nil, ctx.Err()
}
