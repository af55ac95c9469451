// Multicall links the CNI plugins that culvert-cni delegates to into culvert-cni, which
// then acts as the one by whose name it is started: eight programs of 3 MB each contain
// mostly the same runtime and netlink code.
//
// The plugins are main packages of github.com/containernetworking/plugins, which
// nothing can import. So their sources are read from the module cache and written
// to a directory as packages with a Main, beside an overlay (go help build) that
// puts them under culvert/cni/culvert-cni. Nothing else of them is changed.
//
//	go run ./cni/multicall -out DIR PACKAGE ...
//	go build -overlay DIR/overlay.json ./cni/culvert-cni
package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"go/ast"
	"go/build"
	"go/format"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

func main() {
	out := flag.String("out", "", "directory for the sources and overlay.json")
	flag.Parse()
	if err := run(*out, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "multicall:", err)
		os.Exit(1)
	}
}

// host is the package that the plugins are put under, from the module's root.
const host = "cni/culvert-cni"

func run(out string, packages []string) error {
	root, err := os.Getwd()
	if err != nil {
		return err
	}
	if out, err = filepath.Abs(out); err != nil {
		return err
	}
	replace := make(map[string]string)
	put := func(name string, text []byte) error {
		file := filepath.Join(out, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		replace[filepath.Join(root, host, filepath.FromSlash(name))] = file
		return os.WriteFile(file, text, 0o644)
	}
	table := bytes.NewBufferString("package main\n\nimport (\n")
	entries := new(bytes.Buffer)
	for i, pkg := range packages {
		name := path.Base(pkg)
		sources, err := plugin(pkg, fmt.Sprintf("plugin%d", i))
		if err != nil {
			return fmt.Errorf("%s: %w", pkg, err)
		}
		for file, text := range sources {
			if err := put(path.Join(name, file), text); err != nil {
				return err
			}
		}
		fmt.Fprintf(table, "plugin%d %q\n", i, "culvert/"+path.Join(host, name))
		fmt.Fprintf(entries, "delegates[%q] = plugin%d.Main\n", name, i)
	}
	fmt.Fprintf(table, ")\n\nfunc init() {\n%s}\n", entries)
	text, err := format.Source(table.Bytes())
	if err != nil {
		return err
	}
	if err := put("delegates.go", text); err != nil {
		return err
	}
	overlay, err := json.MarshalIndent(map[string]any{"Replace": replace}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(out, "overlay.json"), overlay, 0o644)
}

// plugin returns the sources of a main package, converted to a package of the given name:
// main becomes Main, which also calls the former init, since that must run only for the
// plugin that was started.
func plugin(pkg, name string) (map[string][]byte, error) {
	dir, err := exec.Command("go", "list", "-f", "{{.Dir}}", pkg).Output()
	if err != nil {
		return nil, err
	}
	found, err := build.ImportDir(strings.TrimSpace(string(dir)), 0)
	if err != nil {
		return nil, err
	}
	sources := make(map[string][]byte)
	inits := 0
	var mainFile *ast.File
	files, set := make(map[string]*ast.File), token.NewFileSet()
	for _, file := range found.GoFiles {
		f, err := parser.ParseFile(set, filepath.Join(found.Dir, file), nil, parser.ParseComments)
		if err != nil {
			return nil, err
		}
		f.Name.Name = name
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			switch {
			case !ok || fn.Recv != nil:
			case fn.Name.Name == "main":
				fn.Name.Name, mainFile = "Main", f
			case fn.Name.Name == "init":
				fn.Name.Name = fmt.Sprintf("init%d", inits)
				inits++
			}
		}
		files[file] = f
	}
	if mainFile == nil {
		return nil, fmt.Errorf("%s has no main", found.Dir)
	}
	for _, d := range mainFile.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok && fn.Name.Name == "Main" {
			for i := range inits {
				call := &ast.ExprStmt{X: &ast.CallExpr{Fun: ast.NewIdent(fmt.Sprintf("init%d", i))}}
				fn.Body.List = append([]ast.Stmt{call}, fn.Body.List...)
			}
		}
	}
	for file, f := range files {
		var text bytes.Buffer
		if err := format.Node(&text, set, f); err != nil {
			return nil, err
		}
		sources[file] = text.Bytes()
	}
	return sources, nil
}
