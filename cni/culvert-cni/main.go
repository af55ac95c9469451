// Culvert-cni is culvert's CNI plugin: it reads the node's subnet from
// subnet.env and delegates each pod to bridge and host-local, or to the
// plugins that the network configuration names. Installed under the name
// flannel it takes flannel's place.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/version"

	"culvert/cni"
)

// buildVersion is set by the Makefile: -ldflags "-X main.buildVersion=...".
var buildVersion = ""

func main() {
	if buildVersion == "" {
		buildVersion = "(devel)"
		if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
			buildVersion = info.Main.Version
		}
	}
	about := fmt.Sprintf("CNI plugin %s of culvert, version %s", filepath.Base(os.Args[0]), buildVersion)
	skel.PluginMainFuncs(cni.NewPlugin(os.Args[0]).Funcs(), version.All, about)
}
