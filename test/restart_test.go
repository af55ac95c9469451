package test

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"culvert/cni"
	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

// TestRestartWithoutEtcd restarts daemons while etcd is unreachable, under 100 pings per
// second and a TCP flow: they resume from their files, until their lease expires as it would
// have without the restart, and follow etcd when it is back.
//
//	pod ── n1 (userspace) ── fabric ── n2 (kernel) ── pod
//	         SIGTERM, SIGKILL    │         SIGKILL
//	                         n3, n4, n5: etcd with three members
func TestRestartWithoutEtcd(t *testing.T) {
	t.Parallel()
	labtest.NeedTUN(t)
	l := labtest.New(t, lab.Options{Nodes: 5})
	m := startMembers(t, l)
	c := &cluster{Lab: l, t: t, bin: labtest.Bin(t), endpoint: strings.Join(m.urls(), ",")}
	c.setConfig(config)
	const ttl = 40 * time.Second // three restarts on a slow machine take less
	flags := func(i int) []string { return []string{"--datapath", datapaths[i], "--lease-ttl", ttl.String()} }
	var daemons []*lab.Process
	nodes := c.Nodes[:2]
	for i, n := range nodes {
		daemons = append(daemons, c.start(n, flags(i)...))
	}
	const extra = "/coreos.com/network/subnets/10.5.250.0-30"
	peer := func(public string) string {
		return `{"PublicIP":"` + public + `","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:01:01"},"NodeID":"extra"}`
	}
	client := m.client()
	put := func(value string) {
		t.Helper()
		eventually(t, "write to etcd", func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			_, err := client.Put(ctx, extra, value)
			return err
		})
	}
	put(peer("192.0.2.1"))
	var before []api.Status
	var pods []*lab.Pod
	for _, n := range nodes {
		before = append(before, c.waitReady(n, 2))
		pod, err := n.AddPod(t.Context(), "p1")
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, pod)
	}
	ping(t, pods[0], pods[1])
	flow := startFlow(t, pods[0], pods[1])
	for _, n := range nodes {
		c.waitKept(n, 3)
	}

	for i := range m.procs {
		m.kill(i)
	}
	away := time.Now()
	for _, step := range []struct {
		node int
		stop func(*lab.Process) error
		name string
	}{
		{0, (*lab.Process).Stop, "userspace, SIGTERM"},
		{0, (*lab.Process).Kill, "userspace, SIGKILL"},
		{1, (*lab.Process).Kill, "kernel, SIGKILL"},
	} {
		n := nodes[step.node]
		pings := startPings(t, pods[0], pods[1])
		if err := step.stop(daemons[step.node]); err != nil {
			t.Fatal(err)
		}
		// The jitter does not delay a start with a snapshot of this boot.
		daemons[step.node] = c.start(n, append(flags(step.node), "--start-jitter", "1h")...)
		s := c.wait(n, step.name, func(s api.Status) bool { return s.Ready && !s.Store.Snapshot.IsZero() })
		if s.Store.Connected || len(s.Peers) != 2 || s.Lease.Subnets[0] != before[step.node].Lease.Subnets[0] || len(s.Datapath.Repairs) != 0 {
			t.Errorf("%s: %+v", step.name, s)
		}
		if err := cniStatus(t, n); err != nil {
			t.Errorf("%s: a pod could not be added: %v", step.name, err)
		}
		c.goesOn(flow)
		sent, lost := pings.stop()
		t.Logf("%s: of %d pings %d lost, longest gap %s", step.name, sent, lost, pings.gap())
		if gap := pings.gap(); step.node == 1 && lost > 0 || gap > 30*time.Second {
			t.Errorf("%s: of %d pings %d were lost, with a gap of %s", step.name, sent, lost, gap)
		}
		if _, text := c.get(n, "/metrics"); !strings.Contains(text, "\nculvert_serving_from_snapshot 1\n") {
			t.Errorf("the metric culvert_serving_from_snapshot is not 1: %s", text)
		}
	}

	// The restart did not extend the lease.
	n := nodes[0]
	s := c.wait(n, "has a status", func(api.Status) bool { return true })
	if lasts := s.Lease.Expires.Sub(away); lasts > ttl || lasts < ttl/3 {
		t.Errorf("the lease expires %v after etcd stopped", lasts)
	}
	pings := startPings(t, pods[0], pods[1])
	s = c.wait(n, "is not ready after its lease expired", func(s api.Status) bool { return !s.Ready })
	if over := time.Since(s.Lease.Expires); over < 0 || over > 30*time.Second || !strings.Contains(s.NotReady, "expired") {
		t.Errorf("%v after the lease expired the status is %q", over, s.NotReady)
	}
	if err := cniStatus(t, n); err == nil {
		t.Error("STATUS succeeds after the lease expired")
	}
	if env, err := cni.ReadSubnetEnv(n.SubnetFile()); err != nil || !expired(t, env) {
		t.Errorf("subnet.env says %+v (%v)", env, err)
	}

	// When etcd is back, the nodes renew their leases and follow the change, and no ping
	// is lost.
	for i := range m.procs {
		m.start(i)
	}
	put(peer("192.0.2.2"))
	for i, n := range nodes {
		s := c.wait(n, "follows etcd again", func(s api.Status) bool {
			return s.Ready && s.Store.Connected && s.Store.Snapshot.IsZero() && len(s.Peers) == 2 &&
				slices.ContainsFunc(s.Peers, func(p api.Peer) bool { return p.PublicIPs[0] == netip.MustParseAddr("192.0.2.2") })
		})
		if s.Lease.Subnets[0] != before[i].Lease.Subnets[0] {
			t.Errorf("%s has the subnets %v, want %v", n.ID, s.Lease.Subnets, before[i].Lease.Subnets)
		}
	}
	if _, text := c.get(n, "/metrics"); !strings.Contains(text, "\nculvert_serving_from_snapshot 0\n") {
		t.Errorf("the metric culvert_serving_from_snapshot is not 0: %s", text)
	}
	c.goesOn(flow)
	if sent, lost := pings.stop(); lost > 0 {
		t.Errorf("%d of %d pings were lost", lost, sent)
	}
	if _, _, err := flow.stop(); err != nil {
		t.Error(err)
	}
}

// TestRestartWithoutTrust starts daemons while etcd is unreachable with snapshots that they
// must not use: each logs the reason and waits for etcd. If another node has leased the
// subnet meanwhile, the node is fenced even with a valid snapshot.
func TestRestartWithoutTrust(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.setConfig(config)
	n := c.Nodes[0]
	d := c.start(n, "--lease-ttl", "10m")
	s := c.waitReady(n, 0)
	if _, err := n.AddPod(t.Context(), "p1"); err != nil {
		t.Fatal(err)
	}
	c.waitKept(n, 1)
	stop(t, d)
	file := filepath.Join(n.RunDir, "snapshot.json")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	c.stopEtcd()
	for reason, change := range map[string]struct {
		text  []byte
		flags []string
	}{
		"not a snapshot, or it is truncated": {text: good[:20]},
		"the checksum does not match":        {text: good[:len(good)-20]},
		"it has version 9":                   {text: append([]byte(`{"culvert_snapshot":9,"sha256":""}`+"\n"), good...)},
		"it belongs to the node":             {text: good, flags: []string{"--node-id", "other"}},
		"and this node at 198.18.0.200":      {text: good, flags: []string{"--public-ip", "198.18.0.200"}},
		"it belongs to the network at":       {text: good, flags: []string{"--etcd-prefix", "/elsewhere"}},
		"is not a regular file":              {},
	} {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		if change.text == nil {
			err = os.Mkdir(file, 0o755)
		} else {
			err = os.WriteFile(file, change.text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		d := c.start(n, change.flags...)
		c.wait(n, reason, func(s api.Status) bool { return !s.Ready && strings.Contains(s.NotReady, "etcd") && s.Lease == nil })
		if log := d.Tail(50); strings.Count(log, "the snapshot for a start without etcd cannot be used") != 1 || !strings.Contains(log, reason) {
			t.Errorf("the log lacks %q:\n%s", reason, log)
		}
		stop(t, d)
	}

	// Another node takes the subnet: this node is ready from its snapshot until it learns
	// that from etcd.
	if err := errors.Join(os.Remove(file), os.WriteFile(file, good, 0o600)); err != nil {
		t.Fatal(err)
	}
	d = c.start(n)
	c.wait(n, "is ready from the snapshot", func(s api.Status) bool { return s.Ready && !s.Store.Snapshot.IsZero() })
	if err := d.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	c.continueEtcd()
	c.put(c.leaseKey(s), thief)
	if err := d.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	c.wait(n, "is fenced", func(s api.Status) bool { return s.Fenced != nil && s.Fenced.Pods == 1 })
	if _, err := os.Stat(file); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a fenced node still has its snapshot: %v", err)
	}

	// Even if the snapshot is put back, the node stays fenced.
	if err := os.WriteFile(file, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Kill(); err != nil {
		t.Fatal(err)
	}
	c.stopEtcd()
	c.start(n)
	c.wait(n, "is still fenced", func(s api.Status) bool { return s.Fenced != nil && s.Fenced.Pods == 1 })
	c.continueEtcd()
}

// waitKept waits until a node's snapshot on disk has the given number of leases.
func (c *cluster) waitKept(n *lab.Node, leases int) {
	c.t.Helper()
	eventually(c.t, n.ID+": the snapshot is on disk", func() error {
		text, err := os.ReadFile(filepath.Join(n.RunDir, "snapshot.json"))
		if err != nil {
			return err
		}
		_, body, _ := strings.Cut(string(text), "\n")
		var v struct{ Leases []json.RawMessage }
		if err := json.Unmarshal([]byte(body), &v); err != nil {
			return err
		}
		if len(v.Leases) != leases {
			return errors.New(body)
		}
		return nil
	})
}
