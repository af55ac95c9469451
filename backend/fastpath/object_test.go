package fastpath

import (
	"bytes"
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestObjectsMatchSource compiles the programs and compares them with the committed
// objects.
func TestObjectsMatchSource(t *testing.T) {
	version, err := exec.Command("clang", "--version").Output()
	if err != nil {
		if os.Getenv("CULVERT_FULL") != "" {
			t.Fatal(err)
		}
		t.Skip("needs clang, llvm and libbpf-dev: make test-system installs them, and runs this test")
	}
	dir := t.TempDir()
	if out, err := exec.Command("make", "-C", "../..", "bpf", "BPF_OUT="+dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, name := range []string{"fastpath_el.o", "fastpath_eb.o"} {
		made, committed := code(t, filepath.Join(dir, name)), code(t, filepath.Join("bpf", name))
		for section := range made {
			if !bytes.Equal(made[section], committed[section]) {
				t.Errorf("%s: the section %s is not what bpf/fastpath.c comes to: `make bpf`, with the clang of Debian 12 (here: %s)", name, section, bytes.SplitN(version, []byte("\n"), 2)[0])
			}
		}
	}
}

// code returns the sections of an object that the kernel loads.
func code(t *testing.T, path string) map[string][]byte {
	t.Helper()
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	all := make(map[string][]byte)
	for _, name := range []string{"tc", ".maps", "license"} {
		s := f.Section(name)
		if s == nil {
			t.Fatalf("%s has no section %s", path, name)
		}
		if all[name], err = s.Data(); err != nil {
			t.Fatal(err)
		}
	}
	return all
}
