package cni_test

import (
	"testing"

	"github.com/vishvananda/netlink"

	kernel "culvert/internal/host"
)

// TestClsact checks that the host's end of a pod's veth gets a clsact qdisc on a kernel that
// attaches programs only to one.
func TestClsact(t *testing.T) {
	h := newHost(t, "10.42.3.0/24")
	count := func() (n int) {
		t.Helper()
		if err := h.Do(func() error {
			all, err := netlink.QdiscList(nil)
			for _, q := range all {
				if q.Type() == "clsact" {
					n++
				}
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return n
	}
	old := sandbox(t, h)
	h.must(t, call{verb: "ADD", id: "old", netns: old.Path, old: true})
	if n := count(); n != 1 {
		t.Errorf("%d links have a clsact qdisc, want the host's end of the pod's veth", n)
	}
	if !kernel.TCX() {
		return // all pods get one
	}
	h.must(t, call{verb: "ADD", id: "new", netns: sandbox(t, h).Path})
	if n := count(); n != 1 {
		t.Errorf("after another pod on this kernel %d links have a clsact qdisc", n)
	}
	h.must(t, call{verb: "DEL", id: "old", netns: old.Path})
	if n := count(); n != 0 {
		t.Errorf("after DEL %d links have a clsact qdisc", n)
	}
}
