// Package deploy holds what puts culvert on machines: the systemd unit and the
// Kubernetes manifests.
package deploy

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

// documents returns the YAML documents of the manifests that the kustomization
// names.
func documents(t *testing.T) [][]byte {
	t.Helper()
	var kustomization struct{ Resources []string }
	b, err := os.ReadFile("kubernetes/kustomization.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(b, &kustomization); err != nil {
		t.Fatal(err)
	}
	var all [][]byte
	for _, name := range kustomization.Resources {
		f, err := os.Open(filepath.Join("kubernetes", name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for r := utilyaml.NewDocumentDecoder(f); ; {
			buf := make([]byte, 1<<20)
			n, err := r.Read(buf)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, buf[:n])
		}
	}
	return all
}

// TestManifestsAreKubernetes decodes every manifest strictly into the API's own
// types: an unknown field, or a field in the wrong place, is an error.
func TestManifestsAreKubernetes(t *testing.T) {
	kinds := map[string]func() any{
		"v1/Namespace":      func() any { return &corev1.Namespace{} },
		"v1/ServiceAccount": func() any { return &corev1.ServiceAccount{} },
		"v1/ConfigMap":      func() any { return &corev1.ConfigMap{} },
		"v1/Secret":         func() any { return &corev1.Secret{} },
		"apps/v1/DaemonSet": func() any { return &appsv1.DaemonSet{} },
	}
	var seen []string
	for _, d := range documents(t) {
		if len(bytes.TrimSpace(d)) == 0 {
			continue
		}
		var m metav1.TypeMeta
		if err := yaml.Unmarshal(d, &m); err != nil {
			t.Fatal(err)
		}
		kind := m.APIVersion + "/" + m.Kind
		into, ok := kinds[kind]
		if !ok {
			t.Fatalf("a manifest of kind %s, which no test knows", kind)
		}
		object := into()
		if err := yaml.UnmarshalStrict(d, object); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
		if set, ok := object.(*appsv1.DaemonSet); ok {
			checkDaemonSet(t, set)
		}
		seen = append(seen, kind)
	}
	for kind := range kinds {
		if !slices.Contains(seen, kind) {
			t.Errorf("no manifest of kind %s", kind)
		}
	}
}

// checkDaemonSet checks what the API server checks beyond types.
func checkDaemonSet(t *testing.T, set *appsv1.DaemonSet) {
	t.Helper()
	for key, value := range set.Spec.Selector.MatchLabels {
		if set.Spec.Template.Labels[key] != value {
			t.Errorf("the selector %s=%s does not match the template", key, value)
		}
	}
	pod := set.Spec.Template.Spec
	for _, c := range append(pod.InitContainers, pod.Containers...) {
		for _, m := range c.VolumeMounts {
			if !slices.ContainsFunc(pod.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name }) {
				t.Errorf("container %s mounts %s, which is no volume", c.Name, m.Name)
			}
		}
	}
	if !pod.HostNetwork {
		t.Error("the daemon must be on the node's network")
	}
}
