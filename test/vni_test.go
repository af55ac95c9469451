package test

import (
	"testing"

	"github.com/vishvananda/netlink"

	"culvert/internal/lab"
)

// linkIndex returns the interface index of a node's device. It changes if the device is
// recreated.
func linkIndex(t *testing.T, n *lab.Node, name string) (index int) {
	t.Helper()
	if err := n.Do(func() error {
		l, err := netlink.LinkByName(name)
		if err == nil {
			index = l.Attrs().Index
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return index
}

// TestP3VNIZeroKeepsItsDevice restarts a daemon in a network with VNI 0: it must not recreate
// its device.
func TestP3VNIZeroKeepsItsDevice(t *testing.T) {
	for _, d := range datapaths {
		t.Run(d, func(t *testing.T) {
			c := newCluster(t, 1)
			c.setConfig(`{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":0}}`)
			n := c.Nodes[0]
			p := c.start(n, "--datapath", d)
			device := c.waitReady(n, 0).Datapath.Device
			before := linkIndex(t, n, device)
			stop(t, p)
			p = c.start(n, "--datapath", d)
			c.waitReady(n, 0)
			if after := linkIndex(t, n, device); after != before {
				t.Errorf("%s was recreated:\n%s", device, p.Tail(20))
			}
		})
	}
}
