//go:build kubernetes

package deploy

import (
	"bytes"
	"os"
	"os/exec"
	"testing"

	"culvert/subnet/kube/kubetest"
)

// TestRendered compares the rendered files with what kustomize renders now.
func TestRendered(t *testing.T) {
	for file, from := range map[string]string{"kubernetes/culvert.yaml": "kubernetes", "kubernetes/culvert-etcd.yaml": "kubernetes/etcd"} {
		want, err := exec.Command(kubetest.Program(t, "kubectl"), "kustomize", from).Output()
		if err != nil {
			t.Fatal(err)
		}
		if is, err := os.ReadFile(file); err != nil || !bytes.Equal(is, want) {
			t.Errorf("%s is not up to date with %s (%v): run `make manifests`", file, from, err)
		}
	}
}
