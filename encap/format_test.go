package encap

import (
	"bytes"
	"testing"
)

// TestFormats checks what the loop assumes of every format.
func TestFormats(t *testing.T) {
	for _, f := range formats {
		t.Run(f.Name(), func(t *testing.T) {
			if named, ok := FormatNamed(f.Name()); !ok || named != f {
				t.Errorf("the name leads to %v", named)
			}
			n := f.HeaderLen()
			if n > maxHeaderLen || overUDP(f) && n < vnetHeaderLen {
				t.Errorf("a header of %d bytes does not fit the buffers", n)
			}
			here, there := VTEP{7, [6]byte{2, 1}}, VTEP{7, [6]byte{2, 2}}
			b := bytes.Repeat([]byte{0xff}, n+1)
			f.Put(b[:n:n], here, there, etherTypeIPv4)
			if b[n] != 0xff {
				t.Error("Put writes past its header")
			}
			if etherType, r := f.Check(b, &there); r != Accepted || etherType != etherTypeIPv4 {
				t.Errorf("its own header is %s, of an inner packet %#x", r, etherType)
			}
			for short := range n {
				if _, r := f.Check(b[:short], &there); r != IngressShort {
					t.Errorf("%d bytes of a header are %s", short, r)
				}
			}
			if allocated := testing.AllocsPerRun(10, func() {
				f.Put(b[:n:n], here, there, etherTypeIPv4)
				f.Check(b, &there)
			}); allocated != 0 {
				t.Errorf("%v allocations per packet", allocated)
			}
		})
	}
	for f, want := range map[Format][2]int{VXLAN: {50, 70}, IPIP: {20, 40}} {
		if got := [2]int{Overhead(f, true), Overhead(f, false)}; got != want {
			t.Errorf("the overhead of %s is %v, want %v", f.Name(), got, want)
		}
	}
	if _, ok := FormatNamed("host-gw"); ok {
		t.Error("host-gw has no packets of its own")
	}
}
