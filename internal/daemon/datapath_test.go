package daemon

import (
	"errors"
	"strings"
	"testing"
)

func TestChoose(t *testing.T) {
	none := errors.New("the kernel has no ipip devices")
	for _, c := range []struct {
		asked    Datapath
		format   string
		supports error
		want     Datapath
		why      string // a part of the reason, or of the error
	}{
		{Auto, "vxlan", nil, Kernel, "auto: the kernel has vxlan devices"},
		{Auto, "ipip", none, Userspace, "auto: the kernel has no ipip devices"},
		{Auto, "host-gw", none, Kernel, "no tunnel"},
		{Kernel, "vxlan", nil, Kernel, "--datapath=kernel"},
		{Kernel, "ipip", none, "", "the kernel has no ipip devices (`--datapath=userspace` needs no such device)"},
		{Userspace, "vxlan", nil, Userspace, "--datapath=userspace"},
		{Userspace, "host-gw", nil, "", "host-gw has no tunnel"},
		{"sideways", "vxlan", nil, "", "one of auto, userspace, kernel"},
	} {
		kind, why, err := choose(c.asked, c.format, func(string) error { return c.supports })
		if err != nil {
			why = err.Error()
		}
		if kind != c.want || (err == nil) != (c.want != "") || !strings.Contains(why, c.why) {
			t.Errorf("%s of %s: %q, because %q", c.asked, c.format, kind, why)
		}
	}
}
