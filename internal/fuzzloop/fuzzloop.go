// Package fuzzloop calls fuzz targets in a plain loop, millions of times a second. Go's
// fuzzer is guided by coverage but hundreds of times slower: it finds the inputs, and the
// loop tries many variants of each.
package fuzzloop

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"testing"
	"time"
)

// F is a testing.F that can also run its target in the loop, as asked by the environment:
//
//	CULVERT_FUZZ_EXECUTIONS  number of executions; if empty, F is a testing.F only
//	CULVERT_FUZZ_SEED        of the mutations; the time if empty. It is logged
//	CULVERT_FUZZ_CORPUS      directory with more inputs, in subdirectories named after the targets
//	CULVERT_FUZZ_MINIMISE    1 writes to testdata/fuzz the inputs, smallest first, that add to
//	                         the coverage, and mutates none; needs -cover
type F struct {
	*testing.F
	seeds []input
}

// input holds one value for each parameter of a target.
type input []any

// Of returns f as an F.
func Of(f *testing.F) *F { return &F{F: f} }

// Add adds a seed input, as testing.F does.
func (f *F) Add(values ...any) {
	f.seeds = append(f.seeds, values)
	f.F.Add(values...)
}

// Fuzz runs the target, a function as for testing.F.Fuzz.
func (f *F) Fuzz(target any) {
	f.Helper()
	executions, minimise := os.Getenv("CULVERT_FUZZ_EXECUTIONS"), os.Getenv("CULVERT_FUZZ_MINIMISE") != ""
	if executions == "" && !minimise {
		f.F.Fuzz(target)
		return
	}
	corpus, err := f.corpus(reflect.TypeOf(target))
	if err != nil {
		f.Fatal(err)
	}
	fn := reflect.ValueOf(target)
	done := false
	// testing.F only calls functions of the parameters that the inputs in testdata have.
	f.F.Fuzz(reflect.MakeFunc(fn.Type(), func(args []reflect.Value) []reflect.Value {
		if done {
			return nil
		}
		done = true
		t := args[0].Interface().(*testing.T)
		c := newCall(t, fn)
		if minimise {
			c.minimise(f.Name(), corpus)
			return nil
		}
		n, err := strconv.ParseFloat(executions, 64) // 1e8 is easier to read
		if err != nil {
			t.Fatalf("CULVERT_FUZZ_EXECUTIONS: %v", err)
		}
		seed := uint64(time.Now().UnixNano())
		if text := os.Getenv("CULVERT_FUZZ_SEED"); text != "" {
			if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
				t.Fatalf("CULVERT_FUZZ_SEED: %v", err)
			}
		}
		c.loop(f.Name(), corpus, int(n), seed)
		return nil
	}).Interface())
}

// corpus returns the seeds and the inputs in files.
func (f *F) corpus(target reflect.Type) ([]input, error) {
	all := slices.Clone(f.seeds)
	for _, dir := range []string{filepath.Join("testdata", "fuzz"), os.Getenv("CULVERT_FUZZ_CORPUS")} {
		if dir == "" {
			continue
		}
		dir = filepath.Join(dir, f.Name())
		files, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		for _, file := range files {
			text, err := os.ReadFile(filepath.Join(dir, file.Name()))
			if err != nil {
				return nil, err
			}
			in, err := parse(text, target)
			if err != nil {
				return nil, errors.Join(errors.New(filepath.Join(dir, file.Name())), err)
			}
			all = append(all, in)
		}
	}
	return all, nil
}

// call calls a target with one input after another.
type call struct {
	t      *testing.T
	fn     reflect.Value
	args   []reflect.Value // the first is t
	direct func(*testing.T, []byte)
}

func newCall(t *testing.T, fn reflect.Value) *call {
	c := &call{t: t, fn: fn, args: []reflect.Value{reflect.ValueOf(t)}}
	for i := 1; i < fn.Type().NumIn(); i++ {
		c.args = append(c.args, reflect.New(fn.Type().In(i)).Elem())
	}
	c.direct, _ = fn.Interface().(func(*testing.T, []byte))
	return c
}

func (c *call) run() {
	if c.direct != nil { // saves the cost of reflection
		c.direct(c.t, c.args[1].Bytes())
		return
	}
	c.fn.Call(c.args)
}

func (c *call) loop(name string, corpus []input, executions int, seed uint64) {
	m := newMutator(corpus, seed)
	c.t.Logf("%s: %d executions over %d inputs, seed %d", name, executions, len(corpus), seed)
	began := time.Now()
	finished := false
	defer func() { // also if the target ends the test or panics
		if finished {
			return
		}
		file, err := save(name, m.current())
		c.t.Logf("%s: this input failed: %s (%v)", name, file, err)
	}()
	for range executions {
		m.next(c.args[1:])
		c.run()
		if c.t.Failed() {
			return
		}
	}
	finished = true
	took := time.Since(began)
	c.t.Logf("%s: %d executions in %.0f s, %.0f a second", name, executions, took.Seconds(), float64(executions)/took.Seconds())
}

func (c *call) minimise(name string, corpus []input) {
	if testing.CoverMode() == "" {
		c.t.Fatal("CULVERT_FUZZ_MINIMISE needs -cover")
	}
	slices.SortStableFunc(corpus, func(a, b input) int { return a.size() - b.size() })
	covered, kept := testing.Coverage(), 0
	for _, in := range corpus {
		for i, v := range in {
			set(c.args[1+i], v)
		}
		c.run()
		if now := testing.Coverage(); now > covered {
			covered = now
			if _, err := save(name, in); err != nil {
				c.t.Fatal(err)
			}
			kept++
		}
	}
	c.t.Logf("%s: %d of %d inputs reach all that they reach together", name, kept, len(corpus))
}
