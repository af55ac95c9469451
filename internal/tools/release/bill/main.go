// Bill lists the modules that are linked into the programs below a directory, from their
// build information: a bill of materials (CycloneDX), and the licences in full.
//
//	bill -name NAME -version VERSION -created SECONDS -sbom FILE -notice FILE DIRECTORY
//
// It fails if a module has no licence, or one that is not among those allowed (licences).
package main

import (
	"cmp"
	"debug/buildinfo"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
	"golang.org/x/mod/module"
)

func main() {
	var b bill
	flag.StringVar(&b.name, "name", "", "name of the product")
	flag.StringVar(&b.version, "version", "", "their version")
	created := flag.Int64("created", 0, "time stamp of the bill, in seconds since 1970")
	sbom := flag.String("sbom", "", "file for the bill of materials")
	notice := flag.String("notice", "", "file for the licences")
	flag.Parse()
	b.created = time.Unix(*created, 0).UTC()
	if err := b.run(flag.Arg(0), *sbom, *notice); err != nil {
		fmt.Fprintln(os.Stderr, "bill:", err)
		os.Exit(1)
	}
}

type bill struct {
	name, version string
	created       time.Time
	programs      []program
	modules       map[string]linked // by path and version
}

type program struct {
	name    string
	modules []string
}

// linked is a module, or the Go standard library.
type linked struct {
	path, version string
	licences      []string // SPDX identifiers, sorted
	files         []string // their full texts
}

// licences are the licences allowed in a program, each with a phrase that identifies it.
// All permit redistribution under culvert's own licence; MPL-2.0 covers only its own,
// unchanged files.
var licences = []struct{ id, phrase string }{
	{"Apache-2.0", "apache license version 2.0"},
	{"MPL-2.0", "mozilla public license version 2.0"},
	{"MIT", "permission is hereby granted, free of charge, to any person obtaining a copy"},
	{"ISC", "permission to use, copy, modify, and/or distribute this software for any purpose with or without fee is hereby granted"},
	{"ISC", "permission to use, copy, modify, and distribute this software for any purpose with or without fee is hereby granted"},
	{"BSD-3-Clause", "may be used to endorse or promote products derived from this software"},
	{"BSD-2-Clause", "redistribution and use in source and binary forms"},
}

// identify returns the licences that a text contains. A BSD licence without the third
// clause is BSD-2-Clause.
func identify(text string) (ids []string) {
	text = strings.ToLower(strings.Join(strings.Fields(text), " "))
	text = strings.ReplaceAll(text, "license, version", "license version")
	for _, l := range licences {
		if strings.Contains(text, l.phrase) && !slices.Contains(ids, l.id) && (l.id != "BSD-2-Clause" || !slices.Contains(ids, "BSD-3-Clause")) {
			ids = append(ids, l.id)
		}
	}
	return ids
}

func (b *bill) run(directory, sbom, notice string) error {
	b.modules = make(map[string]linked)
	cache, err := exec.Command("go", "env", "GOMODCACHE", "GOROOT").Output()
	if err != nil {
		return fmt.Errorf("go env: %w", err)
	}
	where := strings.Split(strings.TrimSpace(string(cache)), "\n")
	err = filepath.WalkDir(directory, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := buildinfo.ReadFile(path)
		if err != nil {
			return nil // not a program
		}
		return b.add(filepath.Base(path), info, where[0], where[1])
	})
	if err != nil {
		return err
	}
	if len(b.programs) == 0 {
		return fmt.Errorf("no program is in %s", directory)
	}
	return errors.Join(b.writeNotice(notice), b.writeSBOM(sbom))
}

func (b *bill) add(name string, info *debug.BuildInfo, cache, goroot string) error {
	p := program{name: name}
	for _, m := range append([]*debug.Module{{Path: "std", Version: strings.TrimPrefix(strings.Fields(info.GoVersion)[0], "go")}}, info.Deps...) {
		if m.Replace != nil {
			m = m.Replace
		}
		key := m.Path + " " + m.Version
		p.modules = append(p.modules, key)
		if _, known := b.modules[key]; known {
			continue
		}
		dir := goroot
		if m.Path != "std" {
			path, err1 := module.EscapePath(m.Path)
			version, err2 := module.EscapeVersion(m.Version)
			if err := errors.Join(err1, err2); err != nil {
				return err
			}
			dir = filepath.Join(cache, path+"@"+version)
		}
		l, err := read(dir, m)
		if err != nil {
			return err
		}
		b.modules[key] = l
	}
	b.programs = append(b.programs, p)
	return nil
}

// read finds a module's licences in its directory.
func read(dir string, m *debug.Module) (linked, error) {
	l := linked{path: m.Path, version: m.Version}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return l, fmt.Errorf("the sources of %s: %w", m.Path, err)
	}
	for _, e := range entries { // sorted by name
		name := strings.ToLower(e.Name())
		isNotice := strings.HasPrefix(name, "notice")
		if !e.Type().IsRegular() || !isNotice && !strings.HasPrefix(name, "license") && !strings.HasPrefix(name, "licence") && !strings.HasPrefix(name, "copying") {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return l, err
		}
		l.files = append(l.files, string(text))
		ids := identify(string(text))
		if len(ids) == 0 && !isNotice {
			return l, fmt.Errorf("%s %s: %s is none of the licences that culvert may contain: see internal/tools/release/bill", m.Path, m.Version, e.Name())
		}
		l.licences = append(l.licences, ids...)
	}
	if len(l.licences) == 0 {
		return l, fmt.Errorf("%s %s has no licence file", m.Path, m.Version)
	}
	slices.Sort(l.licences)
	l.licences = slices.Compact(l.licences)
	return l, nil
}

// sorted returns the linked modules, by path.
func (b *bill) sorted() []linked {
	return slices.SortedFunc(maps.Values(b.modules), func(x, y linked) int {
		return cmp.Or(strings.Compare(x.path, y.path), strings.Compare(x.version, y.version))
	})
}

func (b *bill) writeNotice(file string) error {
	const rule = "================================================================\n"
	var t strings.Builder
	t.WriteString("Culvert is under the Apache License 2.0 (LICENSE). Its programs contain the modules below.\n\n")
	for _, m := range b.sorted() {
		fmt.Fprintf(&t, "%-60s %s\n", m.path+" "+m.version, strings.Join(m.licences, ", "))
	}
	for _, m := range b.sorted() {
		name := m.path + " " + m.version
		if m.path == "std" {
			name = "The Go standard library and runtime, " + m.version
		}
		fmt.Fprintf(&t, "\n%s%s\n", rule, name)
		for _, text := range m.files {
			t.WriteString("\n" + text)
		}
	}
	return os.WriteFile(file, []byte(t.String()), 0o644)
}

func (b *bill) writeSBOM(file string) error {
	choices := func(ids []string) *cdx.Licenses {
		var all cdx.Licenses
		for _, id := range ids {
			all = append(all, cdx.LicenseChoice{License: &cdx.License{ID: id}})
		}
		return &all
	}
	ref := func(l linked) string { return "pkg:golang/" + l.path + "@" + l.version }
	bom := cdx.NewBOM()
	bom.SerialNumber = "" // random ones would differ from build to build
	root := cdx.Component{BOMRef: b.name, Type: cdx.ComponentTypeApplication, Name: b.name, Version: b.version, Licenses: choices([]string{"Apache-2.0"})}
	bom.Metadata = &cdx.Metadata{Timestamp: b.created.Format(time.RFC3339), Component: &root}
	var components []cdx.Component
	var dependencies []cdx.Dependency
	var programs []string
	for _, p := range b.programs {
		id := b.name + "/" + p.name
		programs = append(programs, id)
		components = append(components, cdx.Component{BOMRef: id, Type: cdx.ComponentTypeApplication, Name: p.name, Version: b.version, Licenses: choices([]string{"Apache-2.0"})})
		var on []string
		for _, key := range p.modules {
			on = append(on, ref(b.modules[key]))
		}
		slices.Sort(on)
		dependencies = append(dependencies, cdx.Dependency{Ref: id, Dependencies: &on})
	}
	dependencies = append([]cdx.Dependency{{Ref: b.name, Dependencies: &programs}}, dependencies...)
	for _, m := range b.sorted() {
		components = append(components, cdx.Component{BOMRef: ref(m), Type: cdx.ComponentTypeLibrary, Name: m.path, Version: m.version, PackageURL: ref(m), Licenses: choices(m.licences)})
	}
	bom.Components, bom.Dependencies = &components, &dependencies
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	return errors.Join(cdx.NewBOMEncoder(f, cdx.BOMFileFormatJSON).SetPretty(true).Encode(bom), f.Close())
}
