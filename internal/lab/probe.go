package lab

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ServeReflector answers every UDP datagram to the address with the datagram's
// source address as text. It serves until the caller closes the returned socket.
func (n *Namespace) ServeReflector(ctx context.Context, at netip.AddrPort) (net.PacketConn, error) {
	c, err := n.ListenPacket(ctx, "udp", at.String())
	if err != nil {
		return nil, fmt.Errorf("serving a reflector in %s: %w", n.Name, err)
	}
	u := c.(*net.UDPConn)
	go func() {
		for buf := make([]byte, 2048); ; {
			_, from, err := u.ReadFromUDPAddrPort(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
				_, _ = u.WriteToUDPAddrPort([]byte(from.String()), from) // if it is lost, AskReflector asks again
			}
		}
	}()
	return c, nil
}

// AskReflector returns the address that the namespace sends from and the one that
// the reflector sees. They differ if there is address translation in between.
func (n *Namespace) AskReflector(ctx context.Context, at netip.AddrPort) (own, seen netip.AddrPort, err error) {
	c, err := n.Dial(ctx, "udp", at.String())
	if err != nil {
		return own, seen, fmt.Errorf("asking the reflector %s from %s: %w", at, n.Name, err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })()
	own = c.LocalAddr().(*net.UDPAddr).AddrPort()
	own = netip.AddrPortFrom(own.Addr().Unmap(), own.Port())
	buf := make([]byte, 256)
	for range 3 {
		if err = c.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			break
		}
		if ctx.Err() != nil {
			err = ctx.Err()
			break
		}
		if _, err = c.Write([]byte("who am I?")); err != nil {
			continue
		}
		var k int
		if k, err = c.Read(buf); err != nil {
			continue
		}
		if seen, err = netip.ParseAddrPort(string(buf[:k])); err == nil {
			return own, seen, nil
		}
	}
	return own, seen, fmt.Errorf("asking the reflector %s from %s: %w", at, n.Name, err)
}

// Transfer sends payload over one TCP connection from one namespace to an address
// in another, and returns the time from accepting the connection to the last byte.
// It then compares the SHA-256 of both ends, outside the measured time. into is the
// receive buffer, at least as long as payload. The sender uses cubic.
func Transfer(ctx context.Context, from, to *Namespace, addr netip.Addr, payload, into []byte) (time.Duration, error) {
	took, err := transfer(ctx, from, to, addr, payload, into)
	if err != nil {
		return 0, fmt.Errorf("transfer from %s to %s: %w", from.Name, to.Name, err)
	}
	return took, nil
}

func transfer(ctx context.Context, from, to *Namespace, addr netip.Addr, payload, into []byte) (time.Duration, error) {
	if len(into) < len(payload) {
		panic("the receive buffer is smaller than the payload")
	}
	l, err := to.Listen(ctx, "tcp", netip.AddrPortFrom(addr, 0).String())
	if err != nil {
		return 0, err
	}
	defer l.Close()
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()

	sent := make(chan error, 1)
	go func() {
		sent <- func() error {
			c, err := from.DialWith(ctx, net.Dialer{Control: Cubic, Timeout: 10 * time.Second}, "tcp", l.Addr().String())
			if err != nil {
				_ = l.Close() // ends the Accept below
				return err
			}
			defer c.Close()
			defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })()
			if _, err := c.Write(payload); err != nil {
				return err
			}
			if err := c.(*net.TCPConn).CloseWrite(); err != nil {
				return err
			}
			// The receiver closes the connection after the last byte.
			_, err = io.Copy(io.Discard, c)
			return err
		}()
	}()
	took, err := func() (time.Duration, error) {
		c, err := l.Accept()
		if err != nil {
			return 0, err
		}
		defer c.Close()
		defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })()
		start := time.Now()
		n, err := io.ReadFull(c, into[:len(payload)])
		took := time.Since(start)
		if err != nil {
			return 0, fmt.Errorf("%d of %d bytes arrived: %w", n, len(payload), err)
		}
		if extra, err := c.Read(make([]byte, 1)); err != io.EOF {
			return 0, fmt.Errorf("expected EOF after the payload, read %d more bytes: %w", extra, err)
		}
		return took, nil
	}()
	if serr := <-sent; serr != nil {
		err = errors.Join(serr, err)
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		return 0, err
	}
	if sha256.Sum256(into[:len(payload)]) != sha256.Sum256(payload) {
		return 0, errors.New("the SHA-256 of the received bytes differs from the payload's")
	}
	return took, nil
}

// Cubic is a net.Dialer's Control function that sets TCP's congestion control to
// cubic if the kernel has it. New namespaces inherit the host's default, and with a
// pacing one (bbr) a transfer over veth would measure the pacing.
func Cubic(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) {
		_ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "cubic")
	})
}
