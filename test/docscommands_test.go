package test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// notRun says why command lines of the documentation are not run by TestDocsCommands. All
// are parsed by TestDocumentedCommands (internal/cli).
var notRun = []struct{ page, begins, why string }{
	{"benchmarks.md", "culvert bench", "it measures for minutes; make test-system runs it in short"},
	{"operations.md", "culvert run", "its certificates are the reader's; TestFirstContact and subnet/etcd use such"},
	{"kubernetes.md", "culvert c", "it removes what the page has deployed; TestKubernetes does that in its cluster"},
	{"quickstart.md", "culvert", "TestDocs runs the page in order"},
	{"migration.md", "culvert", "TestDocs runs the page in order"},
}

// TestDocsCommands runs the command lines of the pages that a reader need not type in order,
// as they stand there but for names and addresses, on a cluster of two nodes.
func TestDocsCommands(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.setConfig(config)
	c.startAll()
	pods := c.pods()
	ping(t, pods[0], pods[1])
	n, dir := c.Nodes[0], t.TempDir()
	own := c.waitReady(n, 1).Lease.Subnets[0].String()
	// What the pages have, and the lab's replacement.
	here := strings.NewReplacer(
		"'ssh root@n2 culvert'", fmt.Sprintf("'nsenter --net=%s env CULVERT_RUN_DIR=%s %s'", c.Nodes[1].Path, c.Nodes[1].RunDir, filepath.Join(c.bin, "culvert")),
		"10.5.7.0/24", own, "10.5.19.7", pods[1].Addrs[0].String(), "10.5.197.2", pods[0].Addrs[0].String(), "10.5.211.2", pods[1].Addrs[0].String(),
		"node-1,node-2", "n1,n2",
	)
	env := append(os.Environ(), "CULVERT_ETCD_ENDPOINTS="+c.endpoint, "CULVERT_RUN_DIR="+n.RunDir, "CULVERT_SUBNET_FILE="+n.SubnetFile(),
		"CULVERT_BIN_DIR="+filepath.Join(dir, "bin"), "CULVERT_CONF_DIR="+filepath.Join(dir, "net.d"), "PATH="+c.bin+":"+os.Getenv("PATH"))
	// may are the exit codes of a command whose answer is no; a network has its configuration.
	may := map[string]string{"culvert config init": "there is a network configuration already"}
	pages, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	ran := 0
	for _, page := range pages {
		for _, line := range commandsOf(t, page) {
			if why := reasonNotToRun(filepath.Base(page), line); why != "" {
				t.Logf("%s: %s: not run: %s", filepath.Base(page), line, why)
				continue
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			var out []byte
			err := n.Do(func() (err error) {
				cmd := exec.CommandContext(ctx, "sh", "-c", here.Replace(line))
				if strings.Contains(line, "--watch") { // until it is interrupted, once (a second signal kills)
					cmd = exec.CommandContext(ctx, "timeout", "--foreground", "--signal=INT", "--preserve-status", "2", "sh", "-c", "exec "+here.Replace(line))
				}
				cmd.Env = env
				out, err = cmd.CombinedOutput()
				return err
			})
			cancel()
			ran++
			for begins, says := range may {
				if strings.HasPrefix(line, begins) && strings.Contains(string(out), says) {
					err = nil
				}
			}
			if err != nil || len(out) == 0 && !strings.Contains(line, "uninstall") {
				t.Errorf("%s: %s: %v\n%s", filepath.Base(page), line, err, out)
			}
		}
	}
	if ran < 15 {
		t.Errorf("only %d commands were found", ran)
	}
}

// commandsOf returns the culvert command lines in a page's indented and console blocks.
func commandsOf(t *testing.T, page string) (lines []string) {
	t.Helper()
	text, err := os.ReadFile(page)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	inside := false
	prompt, end := regexp.MustCompile(`^(\w*# )?(culvert [a-z].*)$`), regexp.MustCompile(`\s+#.*$|\s*(&&|;|\|).*$`)
	for line := range strings.Lines(strings.ReplaceAll(string(text), "\\\n", " ")) {
		trimmed := strings.TrimSpace(line)
		if strings.HasPrefix(trimmed, "```") {
			inside = !inside && trimmed == "```console"
			continue
		}
		if m := prompt.FindStringSubmatch(trimmed); m != nil && (inside || strings.HasPrefix(line, "    ")) {
			lines = append(lines, end.ReplaceAllString(m[2], ""))
		}
	}
	return lines
}

func reasonNotToRun(page, line string) string {
	for _, n := range notRun {
		if n.page == page && strings.HasPrefix(line, n.begins) {
			return n.why
		}
	}
	return ""
}
