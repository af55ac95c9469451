package bench

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"culvert/bench/load"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

// TestGeneratorCountsMatchKernel compares the built-in generator's counters with
// the kernel's: datagrams sent and received with the UDP counters, and a stream's bytes
// with the link's.
func TestGeneratorCountsMatchKernel(t *testing.T) {
	labtest.NeedTUN(t)
	l := labtest.New(t, lab.Options{Nodes: 2, Underlay: lab.Direct})
	near, far := l.Nodes[0], l.Nodes[1]
	to := far.Addrs[0]

	open := func(k load.Kind) load.Session {
		s, err := load.Local{Place: far}.Open(t.Context(), load.Spec{Kind: k, At: to})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close() })
		return s
	}
	settled := func(s load.Session) load.Reading {
		for last := (load.Reading{}); ; time.Sleep(50 * time.Millisecond) {
			r, err := s.Reading()
			if err != nil {
				t.Fatal(err)
			}
			if r.Bytes == last.Bytes {
				return r
			}
			last = r
		}
	}

	sent, got := udpCounter(t, near, "OutDatagrams"), udpCounter(t, far, "InDatagrams")
	drain := open(load.Drain)
	datagrams, err := load.StartDatagrams([]load.Place{near}, drain.Addr(), 1400, 0)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	if err := datagrams.Close(); err != nil {
		t.Fatal(err)
	}
	r := settled(drain)
	if n := udpCounter(t, near, "OutDatagrams") - sent; n != datagrams.Sent() || n == 0 {
		t.Errorf("%d datagrams sent, the kernel counts %d", datagrams.Sent(), n)
	}
	if n := udpCounter(t, far, "InDatagrams") - got; n != r.Packets || r.Bytes != 1400*r.Packets {
		t.Errorf("%+v received, the kernel counts %d", r, n)
	}

	before := linkCounters(t, far).RxBytes
	sink := open(load.Sink)
	streams, err := load.StartStreams([]load.Place{near}, sink.Addr(), 1, false)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	if err := streams.Close(); err != nil {
		t.Fatal(err)
	}
	r = settled(sink)
	// Headers are 66 bytes per packet of at least 1,514 bytes.
	if n := linkCounters(t, far).RxBytes - before; r.Bytes == 0 || n < r.Bytes || float64(n) > 1.1*float64(r.Bytes) {
		t.Errorf("%d bytes of the stream, %d of the link", r.Bytes, n)
	}
}

// udpCounter reads one of the kernel's UDP counters (RFC 4113) in a node.
func udpCounter(t *testing.T, n *lab.Node, name string) uint64 {
	t.Helper()
	var value uint64
	err := n.Do(func() error {
		text, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		var names []string
		for line := range bytes.Lines(text) {
			fields := strings.Fields(string(line))
			if len(fields) == 0 || fields[0] != "Udp:" {
				continue
			}
			if names == nil {
				names = fields
				continue
			}
			for i := range names {
				if names[i] == name {
					value, err = strconv.ParseUint(fields[i], 10, 64)
					return err
				}
			}
		}
		return fmt.Errorf("no UDP counter %s", name)
	})
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// linkCounters returns the counters of the node's underlay link.
func linkCounters(t *testing.T, n *lab.Node) netlink.LinkStatistics {
	t.Helper()
	var counters netlink.LinkStatistics
	err := n.Do(func() error {
		link, err := netlink.LinkByName(n.Link)
		if err == nil {
			counters = *link.Attrs().Statistics
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return counters
}
