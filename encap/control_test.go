package encap

import (
	"bytes"
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
)

// TestControlMessages compares the layout of two messages with x/sys/unix's, on whatever
// architecture the test runs.
func TestControlMessages(t *testing.T) {
	b := make([]byte, 0, controlSpace)
	b = appendControl(b, unix.SOL_UDP, unix.UDP_SEGMENT, 2)
	binary.NativeEndian.PutUint16(b[len(b)-controlWord:], 1400)
	first := len(b)
	b = appendControl(b, unix.IPPROTO_IP, unix.IP_TOS, 4)
	binary.NativeEndian.PutUint32(b[len(b)-controlWord:], 0xb8)
	if first != unix.CmsgSpace(2) || len(b) != unix.CmsgSpace(2)+unix.CmsgSpace(4) {
		t.Errorf("the messages have %d and %d bytes", first, len(b)-first)
	}
	all, err := unix.ParseSocketControlMessage(b)
	if err != nil || len(all) != 2 {
		t.Fatalf("%v %v", all, err)
	}
	if m := all[0]; m.Header.Level != unix.SOL_UDP || m.Header.Type != unix.UDP_SEGMENT || !bytes.Equal(m.Data, binary.NativeEndian.AppendUint16(nil, 1400)) {
		t.Errorf("UDP_SEGMENT is %+v", m)
	}
	if m := all[1]; m.Header.Level != unix.IPPROTO_IP || m.Header.Type != unix.IP_TOS || !bytes.Equal(m.Data, binary.NativeEndian.AppendUint32(nil, 0xb8)) {
		t.Errorf("IP_TOS is %+v", m)
	}
	if n := controlLen(b); n != unix.CmsgLen(2) || controlNext(n) != first {
		t.Errorf("the first message has %d bytes, the second begins at %d, want %d and %d", n, controlNext(n), unix.CmsgLen(2), first)
	}
}
