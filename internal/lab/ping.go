package lab

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

// Ping sends ICMP echo requests from inside the namespace, one every 200 ms,
// until one is answered or ctx ends, and returns the round-trip time. If source is
// the zero Addr, the kernel chooses it.
func (n *Namespace) Ping(ctx context.Context, source, destination netip.Addr) (time.Duration, error) {
	network, local, protocol := "ip4:icmp", "0.0.0.0", 1
	var request, reply icmp.Type = ipv4.ICMPTypeEcho, ipv4.ICMPTypeEchoReply
	if destination.Is6() {
		network, local, protocol = "ip6:ipv6-icmp", "::", 58
		request, reply = ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply
	}
	if source.IsValid() {
		local = source.String()
	}
	var c net.PacketConn
	err := n.Do(func() error {
		var err error
		c, err = net.ListenPacket(network, local)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("pinging %s from %s: %w", destination, n.Name, err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()

	id := int(uint16(os.Getpid() ^ time.Now().Nanosecond()))
	for seq := 1; ; seq++ {
		sent := time.Now()
		data := binary.BigEndian.AppendUint64([]byte("culvert "), uint64(sent.UnixNano()))
		m, err := (&icmp.Message{Type: request, Body: &icmp.Echo{ID: id, Seq: seq, Data: data}}).Marshal(nil)
		if err == nil {
			_, err = c.WriteTo(m, &net.IPAddr{IP: destination.AsSlice()})
		}
		if err == nil {
			err = c.SetReadDeadline(sent.Add(200 * time.Millisecond))
		}
		if err == nil && ctx.Err() == nil {
			err = awaitEcho(c, protocol, reply, id, data, destination)
			if err == nil {
				return time.Since(sent), nil
			}
		}
		if ctx.Err() != nil {
			return 0, fmt.Errorf("pinging %s from %s: no answer to %d requests: %w", destination, n.Name, seq, ctx.Err())
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			// An error such as "network is unreachable" may be transient.
			select {
			case <-ctx.Done():
				return 0, fmt.Errorf("pinging %s from %s: %w", destination, n.Name, err)
			case <-time.After(200 * time.Millisecond):
			}
		}
	}
}

// awaitEcho reads packets until the reply to the request arrives.
func awaitEcho(c net.PacketConn, protocol int, reply icmp.Type, id int, data []byte, from netip.Addr) error {
	b := make([]byte, 1500)
	for {
		k, a, err := c.ReadFrom(b)
		if err != nil {
			return err
		}
		m, err := icmp.ParseMessage(protocol, b[:k])
		if err != nil || m.Type != reply || !a.(*net.IPAddr).IP.Equal(from.AsSlice()) {
			continue
		}
		if echo, ok := m.Body.(*icmp.Echo); ok && echo.ID == id && bytes.Equal(echo.Data, data) {
			return nil
		}
	}
}
