package report_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"culvert/internal/report"
)

// written writes a report and returns its files by name.
func written(t *testing.T, o report.Options) (report.Summary, map[string]string) {
	t.Helper()
	var b bytes.Buffer
	sum, err := report.Write(t.Context(), &b, o)
	if err != nil {
		t.Fatal(err)
	}
	zip, err := gzip.NewReader(&b)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for archive := tar.NewReader(zip); ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		name, inside := strings.CutPrefix(h.Name, o.Name+"/")
		if !inside || h.Mode != 0o600 {
			t.Errorf("%s has mode %o", h.Name, h.Mode)
		}
		files[name] = string(text)
	}
	return sum, files
}

// TestWrite checks what is in a report of a node without a daemon: the caller's files,
// the daemon's, the configuration; what could not be read, and why; and no secret.
func TestWrite(t *testing.T) {
	root, run := t.TempDir(), t.TempDir()
	put := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put(filepath.Join(root, "etc/culvert/culvert.env"), "CULVERT_ETCD_PASSWORD=hunter22\nCULVERT_NODE_ID=n1\n")
	put(filepath.Join(root, "etc/culvert/etcd.key"), "never read")
	put(filepath.Join(root, "etc/cni/net.d/10-culvert.conflist"), "{}")
	put(filepath.Join(run, "subnet.env"), "FLANNEL_SUBNET=10.5.1.1/24\n")
	if err := syscall.Mkfifo(filepath.Join(run, "lease.json"), 0o600); err != nil {
		t.Fatal(err)
	}
	sum, files := written(t, report.Options{
		Name: "culvert-n1", Root: root, RunDir: run, CNI: "/etc/cni/net.d", Secrets: []string{"t0psecret"},
		First: []report.Source{
			{Name: "status.json", Read: func(context.Context) ([]byte, error) {
				return []byte(`{"node":"n1","x":"t0psecret","p":"hunter22"}`), nil
			}},
			{Name: "metrics.txt", Read: func(context.Context) ([]byte, error) { return nil, errors.New("refused, with t0psecret") }},
			{Name: "part.txt", Read: func(context.Context) ([]byte, error) { return []byte("half"), errors.New("then it failed") }},
			{Name: "large.txt", Read: func(context.Context) ([]byte, error) { return []byte(strings.Repeat("line\n", 1<<20) + "end\n"), nil }},
		},
	})
	for name, want := range map[string]string{
		"status.json":                    `{"node":"n1","x":"[removed]","p":"[removed]"}`,
		"part.txt":                       "half",
		"state/subnet.env":               "FLANNEL_SUBNET=10.5.1.1/24\n",
		"config/etc_culvert_culvert.env": "CULVERT_ETCD_PASSWORD=[removed]\nCULVERT_NODE_ID=n1\n",
		"config/etc_cni_net.d_10-culvert.conflist": "{}",
	} {
		if got, ok := files[name]; !ok || got != want {
			t.Errorf("%s (%t): %q", name, ok, got)
		}
	}
	for name, text := range files {
		if strings.Contains(text, "t0psecret") || strings.Contains(text, "hunter22") || strings.Contains(text, "never read") {
			t.Errorf("%s contains a secret", name)
		}
	}
	for _, want := range []string{"metrics.txt: refused, with [removed]", "part.txt: then it failed", "lease.json is not a regular file"} {
		if !slices.ContainsFunc(sum.Missing, func(m string) bool { return strings.Contains(m, want) }) || !strings.Contains(files["README.txt"], want) {
			t.Errorf("%q is not listed as missing: %v", want, sum.Missing)
		}
	}
	if large := files["large.txt"]; !strings.HasPrefix(large, "[the first ") || !strings.HasSuffix(large, "line\nend\n") || len(large) > 2<<20+100 {
		t.Errorf("a large file: %d bytes, beginning with %.40q", len(large), large)
	}
	// The kernel's tables are read without any program.
	if !strings.Contains(files["kernel/links.jsonl"], `"Name":"lo"`) || files["kernel/version.txt"] == "" || files["kernel/sysctl-net.txt"] == "" {
		t.Error("the kernel's tables are missing")
	}
	if sum.Files != len(files) || sum.Removed < 4 || sum.Bytes < 2<<20 {
		t.Errorf("%+v of %d files", sum, len(files))
	}
}

// TestWriteWithoutPrograms checks that programs that are not installed are named once.
func TestWriteWithoutPrograms(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	sum, _ := written(t, report.Options{Name: "x", Root: t.TempDir(), RunDir: t.TempDir(), CNI: "/none"})
	for _, p := range []string{"ip", "nft", "bridge", "journalctl"} {
		n := 0
		for _, q := range sum.Programs {
			if q == p {
				n++
			}
		}
		if n != 1 {
			t.Errorf("%s is named %d times: %v", p, n, sum.Programs)
		}
	}
}
