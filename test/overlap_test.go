package test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

// TestAPIServerInNetwork starts a daemon whose API server is in the cluster network: it
// refuses before it leases, and `culvert doctor` says the same afterwards.
func TestAPIServerInNetwork(t *testing.T) {
	l := labtest.New(t, lab.Options{Nodes: 1})
	n, culvert, files := l.Nodes[0], filepath.Join(labtest.Bin(t), "culvert"), t.TempDir()
	for name, text := range map[string]string{
		"net-conf.json": `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}`,
		"kubeconfig":    `{"current-context":"c","contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],"clusters":[{"name":"c","cluster":{"server":"https://10.244.200.1:6443"}}],"users":[{"name":"u","user":{"token":"t"}}]}`,
	} {
		if err := os.WriteFile(filepath.Join(files, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	const want = "the API server 10.244.200.1 is in the cluster network 10.244.0.0/16"
	out, err := n.Run(ctx, culvert, "run", "--store=kubernetes", "--node-id=n1", "--run-dir", n.RunDir,
		"--kubeconfig-file", filepath.Join(files, "kubeconfig"), "--net-config-path", filepath.Join(files, "net-conf.json"))
	if err == nil || !strings.Contains(err.Error()+string(out), want) || !strings.Contains(err.Error()+string(out), "--cluster-cidr") {
		t.Errorf("the daemon: %v\n%s", err, out)
	}
	out, err = n.Run(ctx, culvert, "doctor", "--run-dir", n.RunDir, "--no-cni", "-o", "json")
	if err == nil || !strings.Contains(string(out), want) || !strings.Contains(string(out), `"store-in-network"`) {
		t.Errorf("doctor: %v\n%s", err, out)
	}
}
