package test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"culvert/internal/lab"
)

// TestChaosFairness has one pod send as much as it can, by TCP connections or by UDP, while a
// second pod of the node sends over one TCP connection, and a third pings: each of them makes
// progress. It logs what each gets; docs/reliability.md has figures of a run with nothing beside
// it. CULVERT_FAIRNESS is the number of milliseconds for each case; the default is 300.
//
//	greedy, modest, ping pods ── n1 ══ n2 ── one pod each
func TestChaosFairness(t *testing.T) {
	long := time.Duration(times(t, "CULVERT_FAIRNESS", 300)) * time.Millisecond
	for _, d := range datapaths {
		t.Run(d, func(t *testing.T) {
			c := newCluster(t, 2)
			c.setConfig(config)
			c.startAll("--datapath", d)
			var from, to []*lab.Pod
			for _, name := range []string{"greedy", "modest", "ping"} {
				for i, all := range []*[]*lab.Pod{&from, &to} {
					p, err := c.Nodes[i].AddPod(t.Context(), name)
					if err != nil {
						t.Fatal(err)
					}
					*all = append(*all, p)
				}
			}
			for i := range from {
				ping(t, from[i], to[i])
			}
			alone := measureShares(t, long, from, to, "", 0)
			t.Logf("| %s | nobody | | %.0f Mbit/s | %s |", d, alone.modest, alone.pings)
			for _, g := range []struct {
				network string
				flows   int
			}{{"tcp", 1}, {"tcp", 8}, {"udp", 1}, {"udp", 4}} {
				s := measureShares(t, long, from, to, g.network, g.flows)
				t.Logf("| %s | %d %s | %.0f Mbit/s | %.0f Mbit/s | %s |", d, g.flows, g.network, s.greedy, s.modest, s.pings)
			}
		})
	}
}

// shares is what each pod got, in Mbit/s.
type shares struct {
	greedy, modest float64
	pings          string
}

func measureShares(t *testing.T, long time.Duration, from, to []*lab.Pod, network string, flows int) (s shares) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	var greedy, modest atomic.Int64
	for range flows {
		if network == "tcp" {
			startStream(ctx, t, &running, from[0], to[0], &greedy)
		} else {
			startTorrent(ctx, t, &running, from[0], to[0], &greedy)
		}
	}
	startStream(ctx, t, &running, from[1], to[1], &modest)
	time.Sleep(long / 4) // until the connections have their windows
	pings := startPings(t, from[2], to[2])
	began, g, m := time.Now(), greedy.Load(), modest.Load()
	time.Sleep(long)
	took := time.Since(began).Seconds()
	s.greedy, s.modest = float64(greedy.Load()-g)*8/1e6/took, float64(modest.Load()-m)*8/1e6/took
	eventually(t, "another's TCP connection and pings pass", func() error {
		if modest.Load() == m || pings.answered() == 0 {
			return fmt.Errorf("%d bytes and %d pings beside %d flows over %s", modest.Load()-m, pings.answered(), flows, network)
		}
		return nil
	})
	sent, lost := pings.stop()
	s.pings = fmt.Sprintf("%d of %d lost, the slowest %v", lost, sent, pings.slowest.Round(100*time.Microsecond))
	cancel()
	running.Wait()
	return s
}

// startStream sends over a TCP connection as fast as it can, and counts the bytes that
// arrive.
func startStream(ctx context.Context, t *testing.T, running *sync.WaitGroup, from, to *lab.Pod, arrived *atomic.Int64) {
	t.Helper()
	l, err := to.Listen(ctx, "tcp", netip.AddrPortFrom(to.Addrs[0], 0).String())
	if err != nil {
		t.Fatal(err)
	}
	dialing, done := context.WithTimeout(ctx, 20*time.Second)
	defer done()
	client, err := from.DialWith(dialing, net.Dialer{}, "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err := l.Accept()
	l.Close()
	if err != nil {
		t.Fatal(err)
	}
	closeAfter(ctx, running, client, server)
	running.Go(func() {
		b := make([]byte, 128<<10)
		for {
			if _, err := client.Write(b); err != nil {
				return
			}
		}
	})
	running.Go(func() {
		b := make([]byte, 128<<10)
		for {
			n, err := server.Read(b)
			arrived.Add(int64(n))
			if err != nil {
				return
			}
		}
	})
}

// closeAfter closes both ends of a flow when ctx ends.
func closeAfter(ctx context.Context, running *sync.WaitGroup, ends ...io.Closer) {
	running.Go(func() {
		<-ctx.Done()
		for _, e := range ends {
			e.Close()
		}
	})
}

// startTorrent sends datagrams as fast as it can, and counts the bytes that arrive.
func startTorrent(ctx context.Context, t *testing.T, running *sync.WaitGroup, from, to *lab.Pod, arrived *atomic.Int64) {
	t.Helper()
	server, err := to.ListenPacket(ctx, "udp", netip.AddrPortFrom(to.Addrs[0], 0).String())
	if err != nil {
		t.Fatal(err)
	}
	client, err := from.DialWith(ctx, net.Dialer{}, "udp", server.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	closeAfter(ctx, running, client, server)
	running.Go(func() {
		b := make([]byte, 1400)
		for ctx.Err() == nil {
			_, _ = client.Write(b) // it fills the queue on purpose
		}
	})
	running.Go(func() {
		b := make([]byte, 2048)
		for {
			n, _, err := server.ReadFrom(b)
			arrived.Add(int64(n))
			if err != nil {
				return
			}
		}
	})
}
