package host

import (
	"strings"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// answers is a socket that answers each request with the next list.
type answers [][]netlink.Message

func (a *answers) Execute(netlink.Message) ([]netlink.Message, error) {
	next := (*a)[0]
	*a = (*a)[1:]
	return next, nil
}

// TestInterruptedDump has a change interrupt two dumps: the third one counts.
func TestInterruptedDump(t *testing.T) {
	cut := []netlink.Message{{}, {Header: netlink.Header{Flags: netlink.Multi | netlink.DumpInterrupted}}}
	whole := []netlink.Message{{Data: []byte{1}}}
	a := answers{cut, cut, whole}
	got, err := dump(&a, netlink.Message{})
	if err != nil || len(got) != 1 || len(a) != 0 {
		t.Errorf("%v, %v, and %d answers are left", got, err, len(a))
	}
}

// TestEmptyAnswer looks for a link, and the answer has no message, or a short one.
func TestEmptyAnswer(t *testing.T) {
	for _, messages := range [][]netlink.Message{nil, {{Data: make([]byte, unix.SizeofIfInfomsg-1)}}} {
		if _, err := linkIndex(&answers{messages}, "cvt.1"); err == nil || strings.Contains(err.Error(), "%!w") || !strings.Contains(err.Error(), "cvt.1") {
			t.Errorf("%v: %v", messages, err)
		}
	}
}
