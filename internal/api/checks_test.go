package api_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"culvert/internal/api"
)

// TestCheckIDsMatchList compares the list with the ids that the sources use: what
// the daemon warns of and what doctor finds is in it, and nothing else is.
func TestCheckIDsMatchList(t *testing.T) {
	listed := map[string]bool{}
	for _, c := range api.Checks() {
		if listed[c.ID] {
			t.Errorf("%s is listed twice", c.ID)
		}
		listed[c.ID] = true
		if c.Title == "" {
			t.Errorf("%s has no title", c.ID)
		}
	}
	used := regexp.MustCompile(`(?:\bcheck:|\bCheck:|Check\s*=|\.warn\(|Check,\s*f\.Fix\s*=)\s*"([a-z0-9]+(?:-[a-z0-9]+)*)"`)
	text := ""
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.HasSuffix(path, "api/checks.go") || strings.Contains(path, "/bench/") {
			return err
		}
		b, err := os.ReadFile(path)
		for _, m := range used.FindAllStringSubmatch(string(b), -1) {
			if !listed[m[1]] {
				t.Errorf("%s: the check %s is not in the list", path, m[1])
			}
		}
		text += string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for id := range listed {
		if kind, ok := strings.CutPrefix(id, "host-"); ok && strings.Contains(text, `= "`+kind+`"`) {
			continue // made of a host.Kind
		}
		if !strings.Contains(text, `"`+id+`"`) {
			t.Errorf("nothing finds %s", id)
		}
	}
}
