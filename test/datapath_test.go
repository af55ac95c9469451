package test

import (
	"testing"

	"culvert/internal/lab"
)

// TestKernelDatapath is two nodes whose kernels carry the packets, beside one
// in userspace:
//
//	n1 cvt.1 ──┐
//	n2 cvt.1 ──┼── underlay
//	n3 culvert0┘
func TestKernelDatapath(t *testing.T) {
	c := newCluster(t, 3)
	c.setConfig(config)
	var pods []*lab.Pod
	for i, n := range c.Nodes {
		c.start(n, "--datapath", []string{"kernel", "auto", "userspace"}[i])
	}
	for _, n := range c.Nodes {
		c.waitReady(n, 2)
		pod, err := n.AddPod(t.Context(), "p1")
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, pod)
	}
	for _, from := range pods {
		for _, to := range pods {
			if from != to {
				transfer(t, from.Namespace, to.Namespace, from.Addr(true), to.Addr(true), 4<<20)
				datagrams(t, from.Namespace, to.Namespace, from.Addr(true), to.Addr(true))
			}
		}
	}
}
