// Package deploy holds what puts culvert on machines: the systemd unit and the
// Kubernetes manifests.
package deploy

import (
	"bytes"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"culvert/subnet"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

// documents returns the YAML documents of a file.
func documents(t *testing.T, name string) [][]byte {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var all [][]byte
	for r := utilyaml.NewDocumentDecoder(f); ; {
		buf := make([]byte, 1<<20)
		n, err := r.Read(buf)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(bytes.TrimSpace(buf[:n])) > 0 {
			all = append(all, buf[:n])
		}
	}
}

// kinds are the kinds of object that the manifests have, as the API's own types.
var kinds = map[string]func() any{
	"v1/Namespace":      func() any { return &corev1.Namespace{} },
	"v1/ServiceAccount": func() any { return &corev1.ServiceAccount{} },
	"v1/ConfigMap":      func() any { return &corev1.ConfigMap{} },
	"v1/Secret":         func() any { return &corev1.Secret{} },
	"apps/v1/DaemonSet": func() any { return &appsv1.DaemonSet{} },
	"rbac.authorization.k8s.io/v1/ClusterRole":                         func() any { return &rbacv1.ClusterRole{} },
	"rbac.authorization.k8s.io/v1/ClusterRoleBinding":                  func() any { return &rbacv1.ClusterRoleBinding{} },
	"admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy":        func() any { return &admissionv1.ValidatingAdmissionPolicy{} },
	"admissionregistration.k8s.io/v1/ValidatingAdmissionPolicyBinding": func() any { return &admissionv1.ValidatingAdmissionPolicyBinding{} },
}

// TestManifestsAreKubernetes decodes every rendered manifest strictly into the
// API's own types: an unknown field, or a field in the wrong place, is an error.
func TestManifestsAreKubernetes(t *testing.T) {
	for file, want := range map[string][]string{
		"kubernetes/culvert.yaml": {
			"v1/Namespace", "v1/ServiceAccount", "v1/ConfigMap", "apps/v1/DaemonSet",
			"rbac.authorization.k8s.io/v1/ClusterRole", "rbac.authorization.k8s.io/v1/ClusterRoleBinding",
			"admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy", "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicyBinding",
		},
		"kubernetes/culvert-etcd.yaml": {"v1/Namespace", "v1/ServiceAccount", "v1/ConfigMap", "v1/Secret", "apps/v1/DaemonSet"},
	} {
		t.Run(file, func(t *testing.T) {
			var seen []string
			for _, d := range documents(t, file) {
				seen = append(seen, checkDocument(t, d))
			}
			slices.Sort(seen)
			slices.Sort(want)
			if !slices.Equal(seen, want) {
				t.Errorf("it has %v, not %v", seen, want)
			}
		})
	}
}

// checkDocument returns the kind of one object.
func checkDocument(t *testing.T, d []byte) string {
	t.Helper()
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
	switch o := object.(type) {
	case *appsv1.DaemonSet:
		checkDaemonSet(t, o)
	case *corev1.ConfigMap:
		if text, ok := o.Data["net-conf.json"]; ok {
			if _, warnings, err := subnet.ParseConfig([]byte(text)); err != nil || len(warnings) > 0 {
				t.Errorf("net-conf.json: %v, %v", warnings, err)
			}
		}
	}
	return kind
}

// checkDaemonSet checks what the API server checks beyond types, and what the
// docs promise.
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
		s := c.SecurityContext
		switch {
		case s == nil || s.Privileged != nil && *s.Privileged:
			t.Errorf("container %s is privileged", c.Name)
		case s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem:
			t.Errorf("container %s can write to its image", c.Name)
		case s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation:
			t.Errorf("container %s can gain privileges", c.Name)
		case s.Capabilities == nil || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}):
			t.Errorf("container %s keeps capabilities", c.Name)
		case slices.ContainsFunc(s.Capabilities.Add, func(c corev1.Capability) bool { return c != "NET_ADMIN" && c != "NET_RAW" }):
			t.Errorf("container %s has the capabilities %v", c.Name, s.Capabilities.Add)
		}
		// On the host's network they are host ports: a second pod of an update
		// would not be scheduled.
		if len(c.Ports) > 0 {
			t.Errorf("container %s declares ports", c.Name)
		}
		for _, p := range []*corev1.Probe{c.StartupProbe, c.LivenessProbe, c.ReadinessProbe} {
			if p != nil && p.HTTPGet.Port.IntValue() == 0 {
				t.Errorf("a probe of container %s names its port", c.Name)
			}
		}
		if _, tag, _ := strings.Cut(c.Image, ":"); tag == "" || tag == "latest" || c.ImagePullPolicy != corev1.PullIfNotPresent {
			t.Errorf("container %s has the image %s, pulled %s: one that is on the node could not be used", c.Name, c.Image, c.ImagePullPolicy)
		}
		if c.Resources.Requests.Memory().IsZero() || c.Resources.Requests.Cpu().IsZero() {
			t.Errorf("container %s requests nothing", c.Name)
		}
	}
	switch {
	case !pod.HostNetwork:
		t.Error("the daemon must be on the node's network")
	case pod.PriorityClassName != "system-node-critical":
		t.Errorf("its priority is %q", pod.PriorityClassName)
	case pod.SecurityContext == nil || pod.SecurityContext.SeccompProfile == nil || pod.SecurityContext.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault:
		t.Error("there is no seccomp profile")
	case !slices.ContainsFunc(pod.Tolerations, func(t corev1.Toleration) bool { return t.Key == "" && t.Operator == corev1.TolerationOpExists }):
		t.Error("nodes that are not ready would have no network, and never be ready")
	}
}
