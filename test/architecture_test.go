// Package test contains the scenario tests, which run the built binaries in labs, and the
// tests of the repository's rules, such as the allowed imports. It contains no code for
// other packages and holds no state.
package test

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"culvert/encap"
)

// allowed lists which packages of culvert each package may import. Add new packages
// here; imports run downward only.
var allowed = map[string][]string{
	"culvert":                          {"internal/cli"},
	"culvert/internal/cli":             {"internal/daemon", "internal/api", "internal/doctor", "internal/echo", "internal/host", "internal/httpd", "internal/lab", "internal/overlap", "internal/page", "internal/report", "internal/trace", "bench", "bench/report", "cni", "subnet", "subnet/etcd", "subnet/etcd/embedded", "subnet/kube", "internal/names", "internal/remedy"},
	"culvert/internal/daemon":          {"internal/boottime", "subnet", "subnet/etcd", "subnet/etcd/embedded", "subnet/kept", "subnet/kube", "backend", "backend/fastpath", "backend/tunnel", "backend/vxlan", "backend/ipip", "backend/hostgw", "cni", "internal/api", "internal/api/readiness", "internal/confine", "internal/handover", "internal/host", "internal/httpd", "internal/metrics", "internal/overlap", "internal/page", "internal/statefile", "internal/names", "internal/priority", "internal/remedy"},
	"culvert/internal/names":           {},
	"culvert/internal/remedy":          {},
	"culvert/internal/httpd":           {"internal/handover"},
	"culvert/internal/metrics":         {"internal/api", "internal/host"},
	"culvert/internal/overlap":         {"internal/api", "internal/host", "internal/remedy", "subnet"},
	"culvert/subnet/etcd/embedded":     {},
	"culvert/internal/page":            {"internal/api"},
	"culvert/internal/confine":         {},
	"culvert/internal/priority":        {},
	"culvert/internal/lab":             {"internal/host", "cni", "subnet", "internal/statefile"},
	"culvert/internal/lab/labtest":     {"internal/lab"},
	"culvert/internal/echo":            {},
	"culvert/internal/doctor":          {"internal/api", "internal/echo", "internal/host", "internal/names", "internal/remedy"},
	"culvert/internal/trace":           {"internal/echo", "internal/firewall", "internal/host", "internal/names"},
	"culvert/internal/report":          {"internal/firewall", "internal/host"},
	"culvert/internal/firewall":        {"internal/api", "internal/names", "internal/remedy"},
	"culvert/internal/host":            {"internal/api", "internal/firewall", "internal/handover", "internal/names", "internal/remedy"},
	"culvert/internal/api":             {"internal/api/readiness", "internal/handover", "internal/remedy"},
	"culvert/internal/handover":        {},
	"culvert/internal/fuzzloop":        {},
	"culvert/internal/testca":          {},
	"culvert/internal/api/readiness":   {},
	"culvert/backend":                  {"internal/remedy", "subnet", "internal/api", "internal/echo", "internal/firewall", "internal/host"},
	"culvert/backend/tunnel":           {"backend", "subnet", "encap", "internal/api", "internal/firewall", "internal/host", "internal/names", "internal/priority", "internal/remedy"},
	"culvert/backend/fastpath":         {"internal/api", "internal/firewall", "internal/host", "internal/names"},
	"culvert/backend/vxlan":            {"backend", "subnet", "encap", "internal/firewall", "internal/host", "internal/names"},
	"culvert/backend/ipip":             {"backend", "subnet", "internal/firewall", "internal/host", "internal/names"},
	"culvert/backend/hostgw":           {"backend", "subnet", "internal/api", "internal/host"},
	"culvert/encap":                    {},
	"culvert/bench":                    {"bench/load", "internal/lab", "internal/host", "internal/api", "backend", "backend/tunnel", "backend/vxlan", "backend/ipip", "backend/hostgw", "encap", "subnet", "subnet/etcd", "internal/statefile"},
	"culvert/bench/load":               {},
	"culvert/bench/report":             {"bench", "internal/lab"},
	"culvert/subnet":                   {},
	"culvert/subnet/etcd":              {"subnet", "subnet/kept", "internal/boottime", "internal/statefile", "internal/remedy"},
	"culvert/subnet/kept":              {"subnet", "internal/boottime", "internal/statefile"},
	"culvert/internal/boottime":        {},
	"culvert/internal/statefile":       {},
	"culvert/subnet/kube":              {"subnet", "subnet/kept"},
	"culvert/subnet/kube/kubetest":     {"subnet/etcd/etcdtest"},
	"culvert/subnet/contract":          {"subnet", "subnet/kept"},
	"culvert/subnet/etcd/member":       {},
	"culvert/subnet/etcd/etcdtest":     {"subnet/etcd/member"},
	"culvert/subnet/etcd/culvert-etcd": {"subnet/etcd/member"},
	// The plugin must not import internal/host, although it reads a bridge's
	// addresses: that would triple the size of a program that is started for every pod.
	"culvert/cni":                    {"subnet", "internal/api/readiness", "internal/boottime", "internal/statefile"},
	"culvert/cni/culvert-cni":        {"cni"},
	"culvert/cni/multicall":          {},
	"culvert/internal/image":         {},
	"culvert/internal/image/archive": {"internal/image"},
}

// outside lists which packages may import certain large external modules.
var outside = map[string][]string{
	"go.etcd.io/etcd/client/v3":      {"culvert/subnet/etcd", "culvert/subnet/etcd/etcdtest"},
	"go.etcd.io/etcd/server":         {"culvert/subnet/etcd/member"},
	"github.com/google/nftables":     {"culvert/internal/firewall"},
	"golang.zx2c4.com/wireguard":     {"culvert/backend/tunnel", "culvert/bench"},
	"github.com/prometheus":          {"culvert/internal/metrics"},
	"github.com/spf13":               {"culvert/internal/cli"},
	"github.com/containernetworking": {"culvert/cni", "culvert/cni/culvert-cni", "culvert/internal/lab"},
}

type listed struct {
	ImportPath string
	Dir        string
	Doc        string
	Imports    []string
	GoFiles    []string
}

func packages(t *testing.T) []listed {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Dir,Doc,Imports,GoFiles", "culvert/...")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var all []listed
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func TestImportsRunDownward(t *testing.T) {
	for _, p := range packages(t) {
		if len(p.GoFiles) == 0 {
			continue // only test files
		}
		may, known := allowed[p.ImportPath]
		if !known {
			t.Errorf("%s is not in the table of import rules (allowed)", p.ImportPath)
			continue
		}
		for _, i := range p.Imports {
			if ours, ok := strings.CutPrefix(i, "culvert/"); ok && !contains(may, ours) {
				t.Errorf("%s imports %s", p.ImportPath, i)
			}
			if p.ImportPath == "culvert/encap" && strings.Contains(i, ".") && !strings.HasPrefix(i, "golang.org/x/sys/") && !strings.HasPrefix(i, "golang.org/x/net/") {
				t.Errorf("encap imports %s: only the standard library, x/sys and x/net", i)
			}
			for module, by := range outside {
				if strings.HasPrefix(i, module) && !contains(by, p.ImportPath) {
					t.Errorf("%s imports %s, which only %v may import", p.ImportPath, i, by)
				}
			}
		}
	}
}

// TestPackagesSayWhatTheyAre checks that every package has one package comment.
func TestPackagesSayWhatTheyAre(t *testing.T) {
	for _, p := range packages(t) {
		comments := 0
		for _, name := range p.GoFiles {
			f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			if f.Doc != nil && strings.TrimSpace(f.Doc.Text()) != "" {
				comments++
			}
		}
		if len(p.GoFiles) > 0 && comments != 1 {
			t.Errorf("%s has %d package comments instead of one", p.ImportPath, comments)
		}
	}
}

// TestEveryPackageIsInTheMap checks that docs/architecture.md names every package in
// its map, by the last element of its path.
func TestEveryPackageIsInTheMap(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "docs", "architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(text), "\n## Packages\n")
	section, _, ok2 := strings.Cut(rest, "\n## ")
	if !ok || !ok2 {
		t.Fatal("docs/architecture.md has no section Packages")
	}
	for _, p := range packages(t) {
		name := strings.TrimPrefix(p.ImportPath, "culvert/")
		if !strings.HasPrefix(name, "internal/") || strings.Count(name, "/") > 1 {
			name = filepath.Base(name) // below its parent there
		}
		named := regexp.MustCompile(`(^|[^a-z/-])` + regexp.QuoteMeta(name) + `/`)
		if name != "culvert" && !named.MatchString(section) {
			t.Errorf("the map of packages in docs/architecture.md lacks %s", p.ImportPath)
		}
	}
}

func contains(all []string, s string) bool {
	for _, a := range all {
		if a == s {
			return true
		}
	}
	return false
}

// TestEveryDropReasonHasATest checks that each drop reason occurs in a test: those of encap,
// and those that our nftables rules count under.
func TestEveryDropReasonHasATest(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), filepath.Join("..", "encap", "reason.go"), nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var idents []string // in the order of encap.Reasons, Accepted first
	ast.Inspect(file, func(n ast.Node) bool {
		if spec, ok := n.(*ast.ValueSpec); ok && spec.Names[0].IsExported() {
			idents = append(idents, spec.Names[0].Name)
		}
		return true
	})
	reasons := encap.Reasons()
	if len(idents) != len(reasons)+1 || idents[0] != "Accepted" {
		t.Fatalf("%d reasons, and the constants %v", len(reasons), idents)
	}
	tests := allTests(t)
	for i, r := range reasons {
		named := regexp.MustCompile(`\b` + idents[i+1] + `\b|[^a-z-]` + r.String() + `[^a-z-]`)
		if !named.Match(tests) {
			t.Errorf("no test mentions %s (%s)", idents[i+1], r)
		}
	}
	rules, err := os.ReadFile(filepath.Join("..", "internal", "firewall", "tunnelrule.go"))
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`drop\("([a-z-]+)"\)`).FindAllStringSubmatch(string(rules), -1)
	if len(found) < 8 {
		t.Errorf("only %d rules with a drop reason were found", len(found))
	}
	for _, m := range found {
		if !regexp.MustCompile(`[^a-z-]` + m[1] + `[^a-z-]`).Match(tests) {
			t.Errorf("no test mentions %s, a reason of the nftables rules", m[1])
		}
	}
}

// allTests returns the text of all tests.
func allTests(t *testing.T) (tests []byte) {
	t.Helper()
	err := filepath.WalkDir("..", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		tests = append(tests, text...)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return tests
}

// TestDocumentedTestsExist checks that the pages name only tests that exist, by their
// name or the beginning of it.
func TestDocumentedTestsExist(t *testing.T) {
	tests := allTests(t)
	pages, err := filepath.Glob("../docs/*.md")
	if err != nil || len(pages) == 0 {
		t.Fatal(pages, err)
	}
	for _, page := range append(pages, "../README.md", "../CONTRIBUTING.md") {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range regexp.MustCompile(`\b(Test|Fuzz)[A-Z]\w+`).FindAllString(string(text), -1) {
			if !bytes.Contains(tests, []byte("\nfunc "+name)) {
				t.Errorf("%s names %s, which does not exist", page, name)
			}
		}
	}
}
