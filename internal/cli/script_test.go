package cli

import (
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestMain lets the scripts run this test binary as culvert.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"culvert": func() { os.Exit(Main(os.Args[1:])) }})
}

// TestScripts runs culvert as a person does, from a shell, and looks at what it
// prints and how it exits.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata/script"})
}
