package test

import (
	"strings"
	"testing"
	"time"

	"culvert/internal/api"
)

// TestFullNetwork fills a network of five subnets: nodes warn at 80 % and report the
// usage, and a node that finds no free subnet exits with an error that says what to do.
func TestFullNetwork(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.setConfig(`{"Network":"10.5.0.0/21","SubnetLen":24,"SubnetMax":"10.5.5.0","Backend":{"Type":"vxlan"}}`)
	for _, s := range []string{"10.5.1.0/24", "10.5.2.0/24", "10.5.3.0/24"} {
		c.culvert("lease", "reserve", s, "--etcd-endpoints", c.endpoint)
	}
	d := c.start(c.Nodes[0])
	s := c.wait(c.Nodes[0], "reports the usage", func(s api.Status) bool {
		return s.Ready && len(s.Usage) == 1 && s.Usage[0].Used == 4 && s.Usage[0].Capacity == 5
	})
	if log := d.Tail(100); !strings.Contains(log, "nearly full") || !strings.Contains(log, "used=4 capacity=5") {
		t.Errorf("no warning at 80 %%:\n%s", log)
	}
	out, err := c.Nodes[0].Run(t.Context(), c.bin+"/culvert", "status", "--run-dir", c.Nodes[0].RunDir)
	if err != nil || !strings.Contains(string(out), "4 of 5 in 10.5.0.0/21") {
		t.Errorf("status: %s (%v)", out, err)
	}
	free := "10.5.4.0/24"
	if s.Lease.Subnets[0].String() == free {
		free = "10.5.5.0/24"
	}
	c.culvert("lease", "reserve", free, "--etcd-endpoints", c.endpoint)
	full := c.start(c.Nodes[1])
	select {
	case <-full.Exited():
	case <-time.After(20 * time.Second):
		t.Fatal("a daemon that cannot get a subnet keeps running")
	}
	if log := full.Tail(5); full.Err() == nil || !strings.Contains(log, "no free subnet is left in the network: the 5 subnets of /24") || !strings.Contains(log, "culvert lease check") {
		t.Errorf("the daemon printed\n%s", log)
	}
	// Enlarge the network while a daemon runs.
	c.setConfig(`{"Network":"10.5.0.0/20","SubnetLen":24,"Backend":{"Type":"vxlan"}}`)
	c.start(c.Nodes[1])
	c.waitReady(c.Nodes[1], 1)
	c.wait(c.Nodes[0], "reports the larger capacity", func(s api.Status) bool { return s.Usage[0].Capacity == 15 && s.Usage[0].Used == 6 })
}
