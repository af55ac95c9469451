package test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

// TestDocs runs the commands of the quick start and of the migration page, unchanged, on
// two hosts with the addresses used there.
func TestDocs(t *testing.T) {
	for _, c := range []struct {
		page  string
		flags []string // of an etcd that is there before; none if the page starts one
	}{
		{page: "quickstart"},
		{page: "migration", flags: []string{config}},
	} {
		t.Run(c.page, func(t *testing.T) {
			text, err := os.ReadFile("../docs/" + c.page + ".md")
			if err != nil {
				t.Fatal(err)
			}
			script := scriptOf(string(text))
			if strings.Count(script, "\n") < 4 {
				t.Fatalf("commands are missing:\n%s", script)
			}
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, c.page+".txtar"), []byte(script), 0o644); err != nil {
				t.Fatal(err)
			}
			h := newDocsHosts(t)
			if len(c.flags) > 0 {
				h.startFlannelsEtcd(t, c.flags[0])
			}
			testscript.Run(t, testscript.Params{Dir: dir, Cmds: map[string]func(*testscript.TestScript, bool, []string){"vm1": h.on(0), "vm2": h.on(1)}})
		})
	}
}

// scriptOf makes a script of the console blocks of a page.
func scriptOf(page string) string {
	var b strings.Builder
	inside := false
	prompt := regexp.MustCompile(`^(vm[12])# (.*)$`)
	for line := range strings.Lines(page) {
		line = strings.TrimSpace(line)
		switch {
		case line == "```console":
			inside = true
		case line == "```":
			inside = false
		case inside:
			if m := prompt.FindStringSubmatch(line); m != nil {
				fmt.Fprintf(&b, "%s %s\n", m[1], m[2])
			}
		}
	}
	return b.String()
}

// docsHosts are the two hosts of the pages.
type docsHosts struct {
	*lab.Lab
	bin     string
	daemons [2]*lab.Process
	starts  int
}

func newDocsHosts(t *testing.T) *docsHosts {
	labtest.NeedTUN(t)
	bin := labtest.Bin(t)
	return &docsHosts{Lab: labtest.New(t, lab.Options{Nodes: 2, Prefixes: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}}), bin: bin}
}

// startFlannelsEtcd starts an etcd with flannel's configuration on the first host.
func (h *docsHosts) startFlannelsEtcd(t *testing.T, config string) {
	t.Helper()
	p, err := h.Nodes[0].Start(lab.Command{
		Name: "etcd", Path: filepath.Join(h.bin, "culvert-etcd"), Args: []string{"--data-dir", filepath.Join(h.Dir, "flannel-etcd"), "--listen-client", "10.0.0.1:2379", "--unsafe-no-fsync"},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := p.WaitLine(ctx, "ready "); err != nil {
		t.Fatal(err)
	}
	if out, err := h.Nodes[0].Run(t.Context(), filepath.Join(h.bin, "culvert"), "config", "set", config, "--etcd-endpoints", "http://10.0.0.1:2379"); err != nil {
		t.Fatalf("%s\n%v", out, err)
	}
}

// on runs a command line on a host. Files, which a network namespace shares with this
// machine, have their own directories, set by culvert's environment variables.
func (h *docsHosts) on(host int) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		n := h.Nodes[host]
		dir := filepath.Join(h.Dir, n.ID+"-files")
		ts.Check(os.MkdirAll(dir, 0o755))
		env := []string{
			"CULVERT_NODE_ID=" + n.ID, "CULVERT_RUN_DIR=" + n.RunDir, "CULVERT_DATAPATH=userspace", "CULVERT_ETCD_DATA_DIR=" + filepath.Join(dir, "etcd"),
			"CULVERT_BIN_DIR=" + filepath.Join(dir, "bin"), "CULVERT_CONF_DIR=" + filepath.Join(dir, "net.d"),
		}
		if args[0] == "kill" {
			ts.Check(h.daemons[host].Stop())
			return
		}
		background := args[len(args)-1] == "&"
		if background {
			args = args[:len(args)-1]
		}
		if args[0] != "culvert" {
			ts.Fatalf("what is %q?", args[0])
		}
		for i, a := range args {
			args[i] = strings.Replace(a, "/run/flannel/", filepath.Join(dir, "flannel")+"/", 1)
			if args[1] == "cni" && i == 2 && a == "install" {
				env = append(env, "CULVERT_SUBNET_FILE="+n.SubnetFile())
			}
		}
		path, rest := "/usr/bin/env", append(append(env, filepath.Join(h.bin, "culvert")), args[1:]...)
		if background {
			h.starts++
			p, err := n.Start(lab.Command{Name: fmt.Sprintf("%s-%d", n.ID, h.starts), Path: path, Args: rest})
			ts.Check(err)
			h.daemons[host] = p
			return
		}
		// Wait for the daemon for a moment, as a reader would.
		var out []byte
		var err error
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(200 * time.Millisecond) {
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			out, err = n.Run(ctx, path, rest...)
			cancel()
			if err == nil || time.Now().After(end) {
				break
			}
		}
		ts.Logf("%s", out)
		if err != nil && !neg {
			ts.Fatalf("%s: %v", strings.Join(args, " "), err)
		}
	}
}
