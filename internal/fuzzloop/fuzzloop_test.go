package fuzzloop

import (
	"os"
	"reflect"
	"testing"
)

func TestInputSurvivesAFile(t *testing.T) {
	t.Chdir(t.TempDir())
	target := func(*testing.T, []byte, string, uint8, uint16, int, bool) {}
	in := input{[]byte("a\x00\xff\"\n"), "b\n", uint8(200), uint16(65535), -7, true}
	file, err := save("FuzzX", in)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := parse(text, reflect.TypeOf(target)); err != nil || !reflect.DeepEqual(got, in) {
		t.Errorf("%#v became %s and %#v, %v", in, text, got, err)
	}
}

// As Go's fuzzer writes them.
func TestParse(t *testing.T) {
	target := func(*testing.T, uint8, uint8, rune, []byte) {}
	got, err := parse([]byte("go test fuzz v1\nbyte('\\x80')\nuint8(3)\nrune('\\u00e9')\n[]byte(\"x\")\n"), reflect.TypeOf(target))
	if want := (input{uint8(0x80), uint8(3), 'é', []byte("x")}); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%#v, %v", got, err)
	}
	for _, bad := range []string{"", "go test fuzz v1\n", "go test fuzz v2\nbyte('a')\nbyte('a')\nrune('a')\n[]byte(\"\")\n", "go test fuzz v1\nx\nbyte('a')\nrune('a')\n[]byte(\"\")\n"} {
		if in, err := parse([]byte(bad), reflect.TypeOf(target)); err == nil {
			t.Errorf("%q was read as %v", bad, in)
		}
	}
}

// The same seed makes the same inputs, and what a target does to its bytes changes neither
// the corpus nor what is saved of it.
func TestMutatorRepeats(t *testing.T) {
	corpus := []input{{[]byte("hello, world"), "key", uint16(7)}, {[]byte{0x45, 0, 0, 20}, "", uint16(9)}}
	var runs [2][]input
	for k := range runs {
		m := newMutator(corpus, 42)
		c := newCall(t, reflect.ValueOf(func(*testing.T, []byte, string, uint16) {}))
		for range 10000 {
			m.next(c.args[1:])
			clear(c.args[1].Bytes())
			runs[k] = append(runs[k], m.current())
		}
	}
	if !reflect.DeepEqual(runs[0], runs[1]) {
		t.Error("two runs with one seed differ")
	}
	different := make(map[string]bool)
	for _, in := range runs[0] {
		different[string(in[0].([]byte))] = true
	}
	if len(different) < 2000 {
		t.Errorf("%d different values in 10000", len(different))
	}
	if string(corpus[0][0].([]byte)) != "hello, world" {
		t.Error("the corpus changed")
	}
}
