// Culvert-cni is culvert's CNI plugin. It reads the node's subnet from subnet.env
// and delegates to bridge and host-local, or to the plugins that the network
// configuration names. Installed as flannel, it replaces flannel's plugin.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"culvert/cni"
)

// buildVersion is set by the Makefile: -ldflags "-X main.buildVersion=...".
var buildVersion = ""

// delegates are the plugins that are linked in (package multicall), by the names
// that this program is started with for them.
var delegates = make(map[string]func())

func main() {
	if run, ok := delegates[filepath.Base(os.Args[0])]; ok {
		run()
		return
	}
	if buildVersion == "" {
		buildVersion = "(devel)"
		if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
			buildVersion = info.Main.Version
		}
	}
	about := fmt.Sprintf("CNI plugin %s of culvert, version %s", filepath.Base(os.Args[0]), buildVersion)
	// VERSION reads no input, and a plugin started by hand gets none.
	if c := os.Getenv("CNI_COMMAND"); c != "" && c != "VERSION" {
		in, err := cni.BoundedStdin(os.Stdin)
		if err != nil {
			fail(err)
		}
		os.Stdin = in
	}
	skel.PluginMainFuncs(cni.NewPlugin(os.Args[0]).Funcs(), version.All, about)
}

// fail ends the plugin as the specification requires: the error on standard output
// and a non-zero exit code.
func fail(err error) {
	var e *types.Error
	if !errors.As(err, &e) {
		e = types.NewError(types.ErrInternal, err.Error(), "")
	}
	if err := e.Print(); err != nil {
		fmt.Fprintln(os.Stderr, "culvert-cni:", err)
	}
	os.Exit(1)
}
