package bench

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/internal/lab"
)

// fastFlag is the daemon's flag for the fast path, which older versions lack.
const fastFlag = "--fast-path"

// fastPrograms caches hasFastPath by the program's path.
var fastPrograms sync.Map

// hasFastPath reports whether a program's daemon has the flag.
func hasFastPath(ctx context.Context, program string) (bool, error) {
	if known, ok := fastPrograms.Load(program); ok {
		return known.(bool), nil
	}
	text, err := exec.CommandContext(ctx, program, "run", "--help").CombinedOutput()
	if err != nil {
		return false, fmt.Errorf("%s run --help: %w", program, err)
	}
	known := strings.Contains(string(text), fastFlag)
	fastPrograms.Store(program, known)
	return known, nil
}

// daemonArgs returns the daemon's arguments that select the datapath.
func (d Datapath) daemonArgs(hasFlag bool) ([]string, error) {
	name, _, _ := strings.Cut(d.base(), "+") // without a suffix
	format, kind, _ := strings.Cut(name, "/")
	if d.auto || format == "host-gw" {
		kind = "auto"
	}
	args := []string{"--datapath", kind}
	switch {
	case d.fast != "" && !hasFlag:
		return nil, unavailable("this version of culvert has no fast path")
	case d.auto && hasFlag:
		args = append(args, fastFlag+"=auto")
	case d.fast != "":
		args = append(args, fastFlag+"="+d.fast)
	case hasFlag:
		args = append(args, fastFlag+"=off")
	}
	if d.priority {
		args = append(args, "--priority")
	}
	return args, nil
}

// networkConfig returns the network configuration that the datapath's daemons read
// from etcd.
func (d Datapath) networkConfig() string {
	format, _, _ := strings.Cut(d.base(), "/")
	wire := fmt.Sprintf(`{"Type":%q}`, format)
	if format == "vxlan" {
		wire = fmt.Sprintf(`{"Type":%q,"Port":%d}`, format, tunnelPort)
	}
	return fmt.Sprintf(`{"Network":%q,"SubnetLen":24,"Backend":%s}`, innerNetwork, wire)
}

// startDaemons runs etcd in the fabric and culvert's daemon on every node, with the
// daemon's defaults except for what the datapath's name requires.
func (s *site) startDaemons(ctx context.Context, l *lab.Lab, o siteOptions) error {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	if format, _, _ := strings.Cut(s.datapath.base(), "/"); s.datapath.kernel && format != "host-gw" {
		if err := host.Supports(format); err != nil {
			return unavailable(err.Error())
		}
	}
	bin := o.bin
	if bin == "" {
		var err error
		if bin, err = lab.FindBin(); err != nil {
			return err
		}
	}
	program := filepath.Join(bin, "culvert")
	hasFlag, err := hasFastPath(ctx, program)
	if err != nil {
		return err
	}
	args, err := s.datapath.daemonArgs(hasFlag)
	if err != nil {
		return err
	}
	store, err := startEtcd(ctx, l, s.datapath.networkConfig())
	if err != nil {
		return err
	}
	store.client.CloseIdleConnections()
	for _, n := range l.Nodes {
		p, err := n.Start(lab.Command{Name: n.ID, Path: program, Args: append([]string{
			"run", "--node-id", n.ID, "--run-dir", n.RunDir, "--subnet-file", n.SubnetFile(),
			"--etcd-endpoints", store.url, "--iface", n.Link, "--metrics", "",
		}, args...)})
		if err != nil {
			return err
		}
		s.add(labProcess{p}, n.RunDir)
	}
	for i, n := range l.Nodes {
		status, err := s.awaitDaemon(ctx, n, s.daemons[i], len(l.Nodes)-1)
		if err != nil {
			return err
		}
		own, ok := subnetOf(status)
		if !ok {
			return fmt.Errorf("the daemon of %s has no lease", n.ID)
		}
		s.subnets[i] = own
		// A kernel datapath costs the daemon nothing.
		s.daemons[i].idle = status.Datapath.Kind == "kernel"
		fast := status.Datapath.FastPath
		switch {
		case fast != nil && fast.On:
			s.daemons[i].fastDir = n.RunDir
		case s.datapath.fast != "" && fast != nil:
			return unavailable("the fast path is off: " + fast.Why)
		case s.datapath.fast != "":
			return unavailable("the daemon has no fast path for this datapath")
		}
	}
	s.to = s.subnets[0].Addr()
	return nil
}

// awaitDaemon waits until the daemon is ready and has all peers.
func (s *site) awaitDaemon(ctx context.Context, n *lab.Node, d daemon, peers int) (api.Status, error) {
	for {
		status, err := api.GetStatus(ctx, n.RunDir)
		if err == nil && status.Ready && status.Datapath.Peers == peers {
			return status, nil
		}
		select {
		case <-d.process.Exited():
			why, ok := findLine(d.process, nodeFailed)
			if !ok {
				return status, alive([]daemon{d})
			}
			// A kernel without support for the fast path is not a failure.
			if s.datapath.fast != "" && strings.Contains(why, "fast path") {
				return status, unavailable(why)
			}
			return status, errors.New(why)
		case <-ctx.Done():
			return status, fmt.Errorf("the daemon of %s has %d peers instead of %d: %w: %s", n.ID, status.Datapath.Peers, peers, ctx.Err(), d.process.Tail(3))
		case <-time.After(5 * time.Millisecond):
		}
	}
}
