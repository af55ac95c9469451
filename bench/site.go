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

// startTime is how long a datapath may take until a packet has passed.
const startTime = 15 * time.Second

// site is nodes with a datapath between them: all but the first send to that
// one at once.
type site struct {
	underlay string
	datapath Datapath
	offloads map[string]bool // of the nodes' links of the underlay
	bridge   map[string]bool // of the bridge's, if one lies between

	near    []load.Place     // what dials: the ends at all nodes but the first
	far     load.End         // what listens: the one at the first
	to      netip.Addr       // that one's address
	ends    []*lab.Namespace // in a lab: the nodes', or those of their pods
	subnets []netip.Prefix   // in a lab: the nodes'
	daemons []daemon
	labs    *lab.Lab
	farCost func(context.Context) (cost, error) // of another machine; nil for this one
	steal   float64                             // the highest share of CPU time that the hypervisor took
	close   func() error
}

type siteOptions struct {
	nodes   int
	profile lab.Profile
	ends    string // Nodes or Pods
	self    string // this program
	bin     string // directory of culvert's programs; empty: found when it is needed
	absent  int    // peers in the datapath's table that are not there
}

func localEnd(p load.Place) load.End { return load.Local{Place: p} }

// nodeArgs are the arguments by which this program carries a part.
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

// ready waits until the parts say that they are.
func (s *site) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	for _, d := range s.daemons {
		if _, err := d.process.WaitLine(ctx, nodeReady); err != nil {
			if why, ok := said(d.process, nodeUnavailable); ok {
				return unavailable(why)
			}
			if why, ok := said(d.process, nodeFailed); ok {
				return errors.New(why)
			}
			return err
		}
	}
	if s.datapath.kernel {
		// They have done their part: what they cost now is not the datapath's.
		s.daemons = nil
	}
	return nil
}

// nodeFailed is how a command begins to say what went wrong.
const nodeFailed = "culvert: "

func said(p process, prefix string) (string, bool) {
	for line := range strings.Lines(p.Tail(20)) {
		if rest, ok := strings.CutPrefix(line, prefix); ok {
			return strings.TrimSpace(rest), true
		}
	}
	return "", false
}

// reach waits until a datagram from each node has passed.
func (s *site) reach(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	for _, n := range s.near {
		err := load.Reach(ctx, n, s.far, s.to)
		if dead := alive(s.daemons); dead != nil {
			return dead
		}
		if err != nil {
			return fmt.Errorf("nothing has come through to %s: %w", s.to, err)
		}
	}
	return nil
}

// cost is what was spent up to a moment.
type cost struct {
	Machine  CPUTime `json:"machine"`  // of all machines that took part
	Daemons  float64 `json:"daemons"`  // CPU seconds
	RSS      float64 `json:"rss"`      // bytes, of the largest daemon
	Syscalls uint64  `json:"syscalls"` // of the daemons, where they count them
	Packets  uint64  `json:"packets"`  // that entered the tunnel, at any node
	// Carried are the bytes that entered and left the tunnel where there is a fast
	// path, and Fast those of them that took it.
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
