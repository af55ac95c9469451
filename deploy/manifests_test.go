// Package deploy contains the files to deploy culvert (the systemd unit, the Kubernetes
// manifests and the Helm chart) and the tests of them. It has no other code and no
// state.
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

// kinds maps the kinds of object in the manifests to the API's Go types.
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

// TestManifestsAreKubernetes decodes every rendered manifest strictly into the API's Go
// types: an unknown or misplaced field is an error.
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
				t.Errorf("it has the kinds %v, want %v", seen, want)
			}
		})
	}
}

// checkDocument checks one object and returns its kind.
func checkDocument(t *testing.T, d []byte) string {
	t.Helper()
	var m metav1.TypeMeta
	if err := yaml.Unmarshal(d, &m); err != nil {
		t.Fatal(err)
	}
	kind := m.APIVersion + "/" + m.Kind
	into, ok := kinds[kind]
	if !ok {
		t.Fatalf("unknown kind %s: add it to kinds", kind)
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

// checkDaemonSet checks what the API server validates beyond types, and what the docs
// promise.
func checkDaemonSet(t *testing.T, set *appsv1.DaemonSet) {
	t.Helper()
	for key, value := range set.Spec.Selector.MatchLabels {
		if set.Spec.Template.Labels[key] != value {
			t.Errorf("the selector %s=%s does not match the template", key, value)
		}
	}
	pod := set.Spec.Template.Spec
	daemon := pod.Containers[0]
	update := set.Spec.UpdateStrategy.RollingUpdate
	switch {
	case update.MaxSurge.IntValue() != 1 || update.MaxUnavailable.IntValue() != 0:
		t.Error("an update deletes the old pod before the new one has taken over")
	case !slices.Contains(daemon.Args, "--replace") || !slices.Contains(daemon.Args, "--handed-over=wait"):
		t.Errorf("the daemon is started with %v: the two pods of an update would stand in each other's way", daemon.Args)
	case daemon.StartupProbe == nil || daemon.StartupProbe.Exec == nil:
		t.Error("the new pod is ready as soon as the old one answers")
	}
	for _, c := range append(pod.InitContainers, pod.Containers...) {
		for _, m := range c.VolumeMounts {
			if !slices.ContainsFunc(pod.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name }) {
				t.Errorf("container %s mounts %s, which is not a volume of the pod", c.Name, m.Name)
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
		case slices.ContainsFunc(s.Capabilities.Add, func(c corev1.Capability) bool {
			return !slices.Contains([]corev1.Capability{"NET_ADMIN", "NET_RAW", "BPF", "PERFMON"}, c)
		}):
			t.Errorf("container %s has the capabilities %v", c.Name, s.Capabilities.Add)
		}
		// With hostNetwork they would be host ports, and during an update the new pod
		// could not be scheduled beside the old one.
		if len(c.Ports) > 0 {
			t.Errorf("container %s declares ports", c.Name)
		}
		for _, p := range []*corev1.Probe{c.StartupProbe, c.LivenessProbe, c.ReadinessProbe} {
			if p != nil && p.HTTPGet != nil && p.HTTPGet.Port.IntValue() == 0 {
				t.Errorf("a probe of container %s does not have a numeric port", c.Name)
			}
		}
		if _, tag, _ := strings.Cut(c.Image, ":"); tag == "" || tag == "latest" || c.ImagePullPolicy != corev1.PullIfNotPresent {
			t.Errorf("container %s has the image %s with pull policy %s: an image that was loaded on the node would not be used", c.Name, c.Image, c.ImagePullPolicy)
		}
		if c.Resources.Requests.Memory().IsZero() || c.Resources.Requests.Cpu().IsZero() {
			t.Errorf("container %s requests no CPU or no memory", c.Name)
		}
	}
	switch {
	case !pod.HostNetwork:
		t.Error("the pod must have hostNetwork")
	case pod.PriorityClassName != "system-node-critical":
		t.Errorf("its priority is %q", pod.PriorityClassName)
	case pod.SecurityContext == nil || pod.SecurityContext.SeccompProfile == nil || pod.SecurityContext.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault:
		t.Error("the seccomp profile is not RuntimeDefault")
	case !slices.ContainsFunc(pod.Tolerations, func(t corev1.Toleration) bool { return t.Key == "" && t.Operator == corev1.TolerationOpExists }):
		t.Error("the pod does not tolerate all taints: a node that is not ready would never get its network, and never be ready")
	}
}
