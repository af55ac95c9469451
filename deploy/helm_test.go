package deploy

import (
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"text/template"

	"sigs.k8s.io/yaml"

	"culvert/subnet"
)

// render renders the chart as Helm does, with the template functions that the chart uses
// and with values merged over those of values.yaml. It returns the objects by kind.
func render(t *testing.T, values string) map[string]map[string]any {
	t.Helper()
	merged := map[string]any{}
	for _, text := range []string{readFile(t, "helm/culvert/values.yaml"), values} {
		var more map[string]any
		if err := yaml.Unmarshal([]byte(text), &more); err != nil {
			t.Fatal(err)
		}
		lay(merged, more)
	}
	toJSON := func(v any) (string, error) {
		text, err := json.Marshal(v)
		return string(text), err
	}
	functions := template.FuncMap{
		"toJson": toJSON,
		"toYaml": func(v any) (string, error) {
			text, err := yaml.Marshal(v)
			return strings.TrimSuffix(string(text), "\n"), err
		},
		"nindent": func(n int, text string) string {
			pad := "\n" + strings.Repeat(" ", n)
			return pad + strings.ReplaceAll(text, "\n", pad)
		},
		"int":       func(v any) int64 { return int64(v.(float64)) },
		"sha256sum": func(text string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(text))) },
	}
	files, err := filepath.Glob("helm/culvert/templates/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	objects := map[string]map[string]any{}
	for _, file := range files {
		parsed, err := template.New(file).Option("missingkey=error").Funcs(functions).Parse(readFile(t, file))
		if err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		if err := parsed.Execute(&out, map[string]any{"Values": merged, "Release": map[string]any{"Namespace": "culvert"}}); err != nil {
			t.Fatal(err)
		}
		if strings.TrimSpace(out.String()) == "" {
			continue
		}
		for _, document := range strings.Split(out.String(), "\n---\n") {
			kind := checkDocument(t, []byte(document))
			var o map[string]any
			if err := yaml.Unmarshal([]byte(document), &o); err != nil {
				t.Fatal(err)
			}
			objects[kind] = o
		}
	}
	return objects
}

// lay merges over into under, which it changes.
func lay(under, over map[string]any) {
	for key, v := range over {
		if section, ok := v.(map[string]any); ok {
			if is, ok := under[key].(map[string]any); ok {
				lay(is, section)
				continue
			}
		}
		under[key] = v
	}
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestChart checks that the chart with its default values renders the same objects as
// culvert.yaml has, except the namespace, which Helm creates.
func TestChart(t *testing.T) {
	got := render(t, "")
	for _, d := range documents(t, "kubernetes/culvert.yaml") {
		var want map[string]any
		if err := yaml.Unmarshal(d, &want); err != nil {
			t.Fatal(err)
		}
		kind := fmt.Sprintf("%v/%v", want["apiVersion"], want["kind"])
		is := got[kind]
		delete(got, kind)
		switch kind {
		case "v1/Namespace":
			continue
		case "v1/ConfigMap":
			a, b := netConf(t, is), netConf(t, want)
			if !reflect.DeepEqual(a, b) {
				t.Errorf("the network configuration is %+v, want %+v", a, b)
			}
			continue
		case "apps/v1/DaemonSet":
			template := is["spec"].(map[string]any)["template"].(map[string]any)
			delete(template["metadata"].(map[string]any), "annotations")
			sortByName(is)
			sortByName(want)
		}
		if !reflect.DeepEqual(is, want) {
			a, _ := yaml.Marshal(is)
			b, _ := yaml.Marshal(want)
			t.Errorf("%s is\n%s\nwant\n%s", kind, a, b)
		}
	}
	for kind := range got {
		t.Errorf("only the chart has a %s", kind)
	}
}

// sortByName sorts volumes and volume mounts, whose order does not matter to Kubernetes.
func sortByName(v any) {
	switch v := v.(type) {
	case map[string]any:
		for key, inner := range v {
			if list, ok := inner.([]any); ok && (key == "volumes" || key == "volumeMounts") {
				slices.SortFunc(list, func(a, b any) int {
					return cmp.Compare(fmt.Sprint(a.(map[string]any)["name"]), fmt.Sprint(b.(map[string]any)["name"]))
				})
			}
			sortByName(inner)
		}
	case []any:
		for _, inner := range v {
			sortByName(inner)
		}
	}
}

func netConf(t *testing.T, configMap map[string]any) subnet.Config {
	t.Helper()
	cfg, warnings, err := subnet.ParseConfig([]byte(configMap["data"].(map[string]any)["net-conf.json"].(string)))
	if err != nil || len(warnings) > 0 {
		t.Fatal(warnings, err)
	}
	return cfg
}

// TestChartValues renders the chart with other values, under flannel's names.
func TestChartValues(t *testing.T) {
	got := render(t, `
podCidr: 10.42.0.0/16
podCidrv6: fd00:42::/56
culvert:
  backendPort: 4789
  vni: 7
  mtu: 1400
  directRouting: true
  skipCNIConfigInstallation: true
  ownNodePolicy: false
  args: [--datapath=userspace]
  image: {repository: registry.example.org/culvert, tag: v9}
`)
	cfg := netConf(t, got["v1/ConfigMap"])
	b := cfg.Backend
	if len(cfg.Networks) != 2 || cfg.Networks[1].Prefix.String() != "fd00:42::/56" || b.Type != "vxlan" || b.Port != 4789 || b.VNI != 7 || b.MTU != 1400 || !b.DirectRouting {
		t.Errorf("%+v", cfg)
	}
	pod := got["apps/v1/DaemonSet"]["spec"].(map[string]any)["template"].(map[string]any)["spec"].(map[string]any)
	if _, there := pod["initContainers"]; there {
		t.Error("skipCNIConfigInstallation has no effect")
	}
	c := pod["containers"].([]any)[0].(map[string]any)
	if args := fmt.Sprint(c["args"]); !strings.HasSuffix(args, "--datapath=userspace]") || c["image"] != "registry.example.org/culvert:v9" {
		t.Errorf("the container has arguments %s and image %v", args, c["image"])
	}
	if _, there := got["admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy"]; there {
		t.Error("ownNodePolicy: false has no effect")
	}
	cfg = netConf(t, render(t, "culvert: {backend: host-gw}")["v1/ConfigMap"])
	if cfg.Backend.Type != "host-gw" {
		t.Errorf("%+v", cfg.Backend)
	}
}
