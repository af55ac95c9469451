package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"culvert/bench/load"
	"culvert/internal/api"
	"culvert/internal/lab"
)

// startTime limits each step of a datapath's start: the daemons' readiness, and the
// first packet.
const startTime = 15 * time.Second

// site is a set of nodes and the datapath between them. All nodes but the first send
// to the first at the same time.
type site struct {
	underlay string
	datapath Datapath
	offloads map[string]bool // features of the nodes' underlay links
	bridge   map[string]bool // features of the bridge's ports, if there is a bridge

	near    []load.Place     // the ends that dial: at all nodes but the first
	far     load.End         // the end that listens: at the first node
	to      netip.Addr       // the far end's address
	ends    []*lab.Namespace // in a lab: of the nodes or of their pods
	subnets []netip.Prefix   // in a lab: of the nodes
	daemons []daemon
	labs    *lab.Lab
	farCost func(context.Context) (cost, error) // reads the other machine's cost; nil in a lab
	steal   float64                             // the highest share of CPU time that the hypervisor took
	close   func() error
}

type siteOptions struct {
	nodes   int
	profile lab.Profile
	ends    string // Nodes or Pods
	self    string // this program
	bin     string // directory of culvert's programs; empty: lab.FindBin when needed
	absent  int    // number of peers in the datapath's table without a node
}

func localEnd(p load.Place) load.End { return load.Local{Place: p} }

// nodeArgs returns the arguments that make this program run a part.
func nodeArgs(p Part) ([]string, error) {
	text, err := json.Marshal(p)
	return []string{"bench", "node", string(text)}, err
}

func (s *site) add(p process, runDir string) {
	if s.datapath.kernel {
		runDir = ""
	}
	s.daemons = append(s.daemons, daemon{process: p, runDir: runDir})
}

// ready waits until all parts have printed nodeReady.
func (s *site) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	for _, d := range s.daemons {
		if _, err := d.process.WaitLine(ctx, nodeReady); err != nil {
			if why, ok := findLine(d.process, nodeUnavailable); ok {
				return unavailable(why)
			}
			if why, ok := findLine(d.process, nodeFailed); ok {
				return errors.New(why)
			}
			return err
		}
	}
	if s.datapath.kernel {
		// The kernel forwards the packets: the processes' cost is not the datapath's.
		s.daemons = nil
	}
	return nil
}

// nodeFailed begins the line in which culvert prints an error.
const nodeFailed = "culvert: "

// findLine returns the rest of the first line with the prefix among the last lines that
// the process printed.
func findLine(p process, prefix string) (string, bool) {
	for line := range strings.Lines(p.Tail(20)) {
		if rest, ok := strings.CutPrefix(line, prefix); ok {
			return strings.TrimSpace(rest), true
		}
	}
	return "", false
}

// reach waits until a datagram from each near end has arrived at the far end.
func (s *site) reach(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	for _, n := range s.near {
		err := load.Reach(ctx, n, s.far, s.to)
		if dead := alive(s.daemons); dead != nil {
			return dead
		}
		if err != nil {
			return fmt.Errorf("no datagram has arrived at %s: %w", s.to, err)
		}
	}
	return nil
}

// cost is a reading of counters: the difference of two is the cost of what happened in
// between. RSS is the current value.
type cost struct {
	Machine  CPUTime `json:"machine"`  // of all machines
	Daemons  float64 `json:"daemons"`  // CPU seconds
	RSS      float64 `json:"rss"`      // bytes, of the largest daemon
	Syscalls uint64  `json:"syscalls"` // of the daemons that count them
	Packets  uint64  `json:"packets"`  // that entered the tunnel, at all nodes
	// Carried are the bytes that entered and left the tunnel at nodes with a fast
	// path, and Fast those of them that the fast path handled.
	Carried uint64 `json:"carried,omitempty"`
	Fast    uint64 `json:"fast,omitempty"`
}

func (s *site) cost(ctx context.Context) (cost, error) {
	here, err := costHere(ctx, s.daemons)
	if err != nil || s.farCost == nil {
		return here, err
	}
	there, err := s.farCost(ctx)
	if err != nil {
		return here, err
	}
	here.Machine.Busy += there.Machine.Busy
	here.Machine.Steal += there.Machine.Steal
	here.Machine.Idle += there.Machine.Idle
	here.Daemons += there.Daemons
	here.RSS = max(here.RSS, there.RSS)
	here.Syscalls += there.Syscalls
	here.Packets += there.Packets
	return here, nil
}

func costHere(ctx context.Context, daemons []daemon) (c cost, err error) {
	for _, d := range daemons {
		if d.fastDir != "" {
			status, err := api.GetStatus(ctx, d.fastDir)
			if err != nil {
				return c, err
			}
			if fast := status.Datapath.FastPath; fast != nil {
				c.Carried += status.Datapath.Egress.Bytes + status.Datapath.Ingress.Bytes
				c.Fast += fast.Egress.Bytes + fast.Ingress.Bytes
			}
		}
		if d.idle {
			continue
		}
		pid := d.process.Pid()
		seconds, err := processCPU(pid)
		if err != nil {
			return c, err
		}
		c.Daemons += seconds
		rss, err := processRSS(pid)
		if err != nil {
			return c, err
		}
		c.RSS = max(c.RSS, rss)
		if d.runDir == "" {
			continue
		}
		status, err := api.GetStatus(ctx, d.runDir)
		if err != nil {
			return c, err
		}
		c.Syscalls += status.Datapath.Egress.Syscalls + status.Datapath.Ingress.Syscalls
		c.Packets += status.Datapath.Egress.Packets
	}
	c.Machine, err = machineCPU()
	return c, err
}
