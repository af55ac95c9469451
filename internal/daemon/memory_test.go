package daemon

import (
	"bufio"
	"slices"
	"strings"
	"testing"
)

func TestReadOnly(t *testing.T) {
	const smaps = `00400000-011c3000 r-xp 00000000 fe:01 1234    /usr/local/my bin/culvert
Size:              14092 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
011c3000-01f00000 r--p 00dc3000 fe:01 1234    /usr/local/my bin/culvert
Anonymous:             0 kB
01f00000-01f10000 r--p 01afff00 fe:01 1234    /usr/local/my bin/culvert
Anonymous:             4 kB
01f10000-01f80000 rw-p 01b0ff00 fe:01 1234    /usr/local/my bin/culvert
Anonymous:             0 kB
01f80000-03f80000 rw-p 00000000 00:00 0
Anonymous:           100 kB
7f0000000000-7f0000010000 r--p 00000000 fe:01 99    /usr/lib/other
Anonymous:             0 kB
7fff00000000-7fff00002000 r-xp 00000000 00:00 0    [vdso]
Anonymous:             0 kB
`
	got, err := readOnly(bufio.NewScanner(strings.NewReader(smaps)), "/usr/local/my bin/culvert")
	want := []mapping{{0x400000, 0x11c3000}, {0x11c3000, 0x1f00000}} // neither relocated pages, nor data, nor another file
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%x, %v, want %x", got, err, want)
	}
}
