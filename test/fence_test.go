package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"culvert/internal/api"
	"culvert/internal/lab"
)

// thief is the lease of another node, which takes a subnet over.
const thief = `{"PublicIP":"198.18.0.99","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:99"},"NodeID":"thief"}`

func (c *cluster) leaseKey(s api.Status) string {
	return "/coreos.com/network/subnets/" + strings.Replace(s.Lease.Subnets[0].String(), "/", "-", 1)
}

// cleanKernel returns an error unless a fenced node's kernel has the unreachable route for
// the cluster network and nothing else of culvert's.
func cleanKernel(n *lab.Node, lost netip.Prefix) error {
	var problem error
	err := n.Do(func() error {
		changes, err := kernelState()
		for _, line := range changes {
			if !strings.HasPrefix(line, "unreachable 10.5.0.0/16") {
				problem = fmt.Errorf("the kernel of %s, which lost %s, still has: %s", n.ID, lost, line)
			}
		}
		if len(changes) == 0 {
			problem = fmt.Errorf("packets from %s to the cluster network can take the default route", n.ID)
		}
		return err
	})
	return errors.Join(err, problem)
}

// TestFence suspends a daemon until its lease has expired and another node has taken the
// subnet, and resumes it:
//
//	SIGSTOP ... lease expires, "thief" leases the subnet ... SIGCONT → fenced
//	→ daemon killed and started: still fenced → pod deleted → leases another subnet
func TestFence(t *testing.T) {
	t.Parallel()
	for _, d := range datapaths {
		t.Run(d, func(t *testing.T) { fence(t, "--datapath="+d) })
	}
}

func fence(t *testing.T, datapath string) {
	c := newCluster(t, 2)
	n, witness := c.Nodes[0], c.Nodes[1]
	c.setConfig(config)
	d := c.start(n, datapath, "--lease-ttl", "5s")
	c.start(witness, datapath)
	before := c.waitReady(n, 1)
	c.waitReady(witness, 1)
	lost := before.Lease.Subnets[0]
	pod, err := n.AddPod(t.Context(), "p1")
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	c.wait(witness, "sees the lease expire", func(s api.Status) bool { return len(s.Peers) == 0 })
	c.put(c.leaseKey(before), thief)
	c.wait(witness, "has the thief as peer", func(s api.Status) bool { return len(s.Peers) == 1 && s.Peers[0].Node == "thief" })

	continued := time.Now()
	if err := d.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	s := c.wait(n, "is fenced", func(s api.Status) bool { return s.Fenced != nil && s.Fenced.Pods == 1 })
	t.Logf("fenced %v after SIGCONT", time.Since(continued).Round(time.Millisecond))
	if s.Ready || s.Lease != nil || !strings.Contains(s.NotReady, "thief") || !strings.Contains(s.NotReady, "1 pods of it are left") {
		t.Errorf("status: %+v", s)
	}
	if _, err := os.Stat(n.SubnetFile()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("subnet.env of a fenced node: %v", err)
	}
	if err := cleanKernel(n, lost); err != nil {
		t.Error(err)
	}
	if err := cniStatus(t, n); err == nil || !strings.Contains(err.Error(), "thief") {
		t.Errorf("STATUS of a fenced node: %v", err)
	}
	var e *types.Error
	if _, err := n.AddPod(t.Context(), "p2"); !errors.As(err, &e) || e.Code != types.ErrTryAgainLater {
		t.Errorf("ADD on a fenced node: %v", err)
	}
	if log := d.Tail(50); !strings.Contains(log, "fenced: another node holds") || !strings.Contains(log, "thief") {
		t.Errorf("the log lacks the fence or the thief:\n%s", log)
	}

	// A restart does not end the fence.
	if err := d.Kill(); err != nil {
		t.Fatal(err)
	}
	d = c.start(n, datapath, "--lease-ttl", "5s")
	c.wait(n, "is fenced after a restart", func(s api.Status) bool { return s.Fenced != nil && s.Fenced.Pods == 1 })

	// When the last pod of the lost subnet is deleted, the node leases another subnet.
	if err := pod.Delete(t.Context()); err != nil {
		t.Error(err)
	}
	after := c.waitReady(n, 2)
	if after.Lease.Subnets[0] == lost || after.Fenced != nil {
		t.Errorf("after the fence: %+v", after.Lease)
	}
	if pod, err = n.AddPod(t.Context(), "p3"); err != nil {
		t.Fatal(err)
	}

	// The subnet is lost while the daemon is not running. With --on-lost=release the
	// daemon leases another at once.
	if err := d.Stop(); err != nil {
		t.Fatal(err)
	}
	c.put(c.leaseKey(after), thief)
	d = c.start(n, datapath, "--lease-ttl", "5s")
	s = c.wait(n, "is fenced at its start", func(s api.Status) bool { return s.Fenced != nil })
	if s.Fenced.Subnets[0] != after.Lease.Subnets[0] || !strings.Contains(s.Fenced.Reason, "thief") {
		t.Errorf("fenced with %+v", s.Fenced)
	}
	if err := d.Stop(); err != nil {
		t.Fatal(err)
	}
	c.start(n, datapath, "--on-lost=release")
	last := c.wait(n, "leases another subnet", func(s api.Status) bool { return s.Ready && s.Lease != nil })
	if last.Lease.Subnets[0] == after.Lease.Subnets[0] || last.Lease.Subnets[0] == lost {
		t.Errorf("the node has the lost subnet %s again", last.Lease.Subnets[0])
	}
	// While a pod of the lost subnet exists, the plugin does not add pods to the new one.
	if err := cniStatus(t, n); err == nil || !strings.Contains(err.Error(), "cni0") {
		t.Errorf("STATUS with a pod of another subnet: %v", err)
	}
	if err := pod.Delete(t.Context()); err != nil {
		t.Error(err)
	}
	eventually(t, "STATUS without that pod", func() error { return cniStatus(t, n) })
}

// TestReleaseOnExit stops a node with --release-on-exit: nothing of it is left in the
// kernel or in the run directory, and its subnet is in quarantine.
func TestReleaseOnExit(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.setConfig(config)
	d := c.start(c.Nodes[0], "--release-on-exit")
	c.start(c.Nodes[1])
	had := c.waitReady(c.Nodes[0], 1).Lease.Subnets[0]
	c.waitReady(c.Nodes[1], 1)
	eventually(t, "both leases are listed", func() error { return c.listed("leased", 2) })
	if err := d.Stop(); err != nil {
		t.Fatal(err)
	}
	if d.Err() != nil {
		t.Errorf("the daemon exited with %v", d.Err())
	}
	c.waitReady(c.Nodes[1], 0)
	for _, name := range []string{"subnet.env", "lease.json"} {
		if _, err := os.Stat(filepath.Join(c.Nodes[0].RunDir, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := c.Nodes[0].Do(func() error {
		left, err := kernelState()
		if len(left) > 0 {
			t.Errorf("left in the kernel: %v", left)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	if err := c.listed("resting", 1); err != nil {
		t.Error(err)
	}
	t.Logf("%s is in quarantine", had)
}

// listed returns nil if `culvert lease list` shows n entries of a state.
func (c *cluster) listed(state string, n int) error {
	out, err := c.Fabric.Run(c.t.Context(), filepath.Join(c.bin, "culvert"), "lease", "list", "-o", "json", "--etcd-endpoints", c.endpoint)
	if err != nil {
		return err
	}
	var all []struct{ State string }
	if err := json.Unmarshal(out, &all); err != nil {
		return err
	}
	k := 0
	for _, v := range all {
		if v.State == state {
			k++
		}
	}
	if k != n {
		return fmt.Errorf("%d entries are %s, want %d: %s", k, state, n, out)
	}
	return nil
}
