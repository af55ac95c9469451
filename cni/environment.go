package cni

import (
	"os"
	"path/filepath"
	"strings"
)

// pluginDirs are the directories that the runtime's CNI_PATH names.
func pluginDirs() []string { return filepath.SplitList(os.Getenv("CNI_PATH")) }

// delegateEnv is the environment of a delegate: ours, with another verb and
// perhaps without a namespace.
type delegateEnv struct{ verb, netns string }

// AsEnv implements invoke.CNIArgs.
func (d delegateEnv) AsEnv() []string {
	var env []string
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "CNI_COMMAND=") && !strings.HasPrefix(kv, "CNI_NETNS=") {
			env = append(env, kv)
		}
	}
	return append(env, "CNI_COMMAND="+d.verb, "CNI_NETNS="+d.netns)
}
