package cli

import (
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"culvert/cni"
	"culvert/internal/api"
	"culvert/internal/doctor"
)

// TestJSONNames looks at what `-o json` prints: names are in snake_case, and a duration is
// a number of seconds whose name says so.
func TestJSONNames(t *testing.T) {
	name := regexp.MustCompile(`^[a-z][a-z0-9]*(_[a-z0-9]+)*$`)
	seen := make(map[reflect.Type]bool)
	var look func(reflect.Type)
	look = func(of reflect.Type) {
		switch of.Kind() {
		case reflect.Pointer, reflect.Slice, reflect.Array, reflect.Map:
			look(of.Elem())
			return
		case reflect.Struct:
		default:
			return
		}
		if seen[of] || !strings.HasPrefix(of.PkgPath(), "culvert/") {
			return
		}
		seen[of] = true
		for i := range of.NumField() {
			f := of.Field(i)
			tag, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if !f.IsExported() && !f.Anonymous || tag == "-" {
				continue
			}
			if f.Type == reflect.TypeFor[time.Duration]() {
				t.Errorf("%s.%s is printed in nanoseconds", of, f.Name)
			}
			if !f.Anonymous && !name.MatchString(tag) {
				t.Errorf("%s.%s has the name %q", of, f.Name, tag)
			}
			look(f.Type)
		}
	}
	for _, v := range []any{api.Status{}, api.Peers{}, api.Warning{}, doctor.Result{}, pingResult{}, traceResult{}, leaseView{}, leaseReport{}, demoResult{}, cni.Report{}} {
		look(reflect.TypeOf(v))
	}
}
