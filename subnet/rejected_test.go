package subnet_test

import (
	"testing"

	"culvert/subnet"
)

// A rejection is new once per revision of its entry and reason.
func TestRejectionLog(t *testing.T) {
	var log subnet.RejectionLog
	revision := int64(1)
	for i, c := range []struct {
		rejected []subnet.Rejection
		fresh    int
	}{
		{[]subnet.Rejection{{Key: "a", Reason: "x"}, {Key: "b", Reason: "x"}}, 2},
		{[]subnet.Rejection{{Key: "a", Reason: "x"}, {Key: "b", Reason: "y"}}, 1},
		{[]subnet.Rejection{{Key: "a", Reason: "x"}}, 0},
		{[]subnet.Rejection{{Key: "a", Reason: "x"}, {Key: "b", Reason: "y"}}, 1},
	} {
		if fresh := log.New(c.rejected, func(string) int64 { return revision }); len(fresh) != c.fresh {
			t.Errorf("%d: %v of %v are new, want %d", i, fresh, c.rejected, c.fresh)
		}
	}
	revision++
	if fresh := log.New([]subnet.Rejection{{Key: "a", Reason: "x"}}, func(string) int64 { return revision }); len(fresh) != 1 {
		t.Errorf("at another revision: %v", fresh)
	}
}
