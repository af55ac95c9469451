package test

import (
	"testing"
	"time"

	"culvert/internal/api"
)

// TestUpgrade restarts a daemon under a ping a thousand times a second, as an
// upgrade does, and then kills one. A kernel goes on without it: nothing is
// lost.
func TestUpgrade(t *testing.T) {
	c := newCluster(t, 2)
	c.datapath = "kernel"
	c.setConfig(config)
	n := c.Nodes[0]
	p := c.start(n)
	c.start(c.Nodes[1])
	for _, n := range c.Nodes {
		c.waitReady(n, 1)
	}
	pods := c.pods()
	ping(t, pods[0], pods[1])
	flow := startFlow(t, pods[0], pods[1])
	for _, end := range []struct {
		name string
		stop func() error
	}{{"SIGTERM", p.Stop}, {"SIGKILL", func() error { return p.Kill() }}} {
		pings := startPingsEvery(t, pods[0], pods[1], time.Millisecond)
		if err := end.stop(); err != nil {
			t.Fatal(err)
		}
		p = c.start(n)
		s := c.wait(n, "ready again", func(s api.Status) bool { return s.Ready && len(s.Peers) == 1 })
		if len(s.Datapath.Repairs) != 0 {
			t.Errorf("%s: repaired %v", end.name, s.Datapath.Repairs)
		}
		c.goesOn(flow)
		sent, lost := pings.stop()
		t.Logf("%s: of %d pings %d lost, %s without an answer at the longest", end.name, sent, lost, pings.gap())
		if lost != 0 {
			t.Errorf("%s: of %d pings %d were lost", end.name, sent, lost)
		}
	}
}
