package names

import "testing"

func TestOurs(t *testing.T) {
	for device, want := range map[string][2]bool{ // managed, ours
		TUN: {true, true}, SuperFrame: {false, true}, IPIP: {true, true}, JoinNear: {true, true}, JoinFar: {true, true}, Probe: {true, true},
		VXLAN(1, true): {true, true}, VXLAN(1<<24-1, false): {true, true}, VXLAN(0, true): {true, true},
		"cvt.": {}, "cvt.x": {}, "cvt6.": {}, "cvt.1a": {}, "culvert1": {}, "cni0": {}, "flannel.1": {}, "": {},
	} {
		if got := [2]bool{Managed(device), Ours(device)}; got != want {
			t.Errorf("%q: managed, ours: %v, not %v", device, got, want)
		}
	}
	if name := VXLAN(1<<24-1, false); len(name) > 15 {
		t.Errorf("%s has more than 15 characters", name)
	}
}
