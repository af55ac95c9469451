package bench

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestLoadAndSave reads a report and writes it again, unchanged.
func TestLoadAndSave(t *testing.T) {
	golden := filepath.Join("report", "testdata", "report.json")
	r, err := Load(golden)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "report.json")
	if err := r.Save(path); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the report written again differs (%v):\n%s", err, got)
	}
	if left, _ := filepath.Glob(path + ".*"); len(left) > 0 {
		t.Errorf("temporary files are left: %v", left)
	}
}

func TestLoadRefuses(t *testing.T) {
	for text, want := range map[string]string{
		`{"schema":0,"results":[]}`: "has schema 0, and this version reads schema 1: measure again",
		`{}`:                        "has schema 0",
		`[]`:                        "is not a report of culvert bench --json",
		`{"schema":1,"results":[{"metric":"speed","rounds":[1]}]}`:  `metric "speed"`,
		`{"schema":1,"results":[{"metric":"throughput"}]}`:          "0 rounds",
		`{"schema":1,"results":[{"metric":"throughput","rounds":1}`: "is not a report",
	} {
		path := filepath.Join(t.TempDir(), "report.json")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want float64
	}{{nil, 0}, {[]float64{3}, 3}, {[]float64{3, 1}, 2}, {[]float64{9, 1, 5}, 5}, {[]float64{4, 1, 3, 2}, 2.5}} {
		if got := median(c.in); got != c.want {
			t.Errorf("median of %v: %v", c.in, got)
		}
	}
}
