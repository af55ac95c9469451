package cni

import (
	"os"
	"path/filepath"
	"strings"
)

// pluginDirs returns the directories in CNI_PATH.
func pluginDirs() []string { return filepath.SplitList(os.Getenv("CNI_PATH")) }

// delegateEnv is the environment of a delegate: ours, except for the verb, the
// attachment and the namespace.
type delegateEnv struct {
	verb       string
	attachment Attachment // empty for GC and STATUS
	netns      string
}

// AsEnv implements invoke.CNIArgs.
func (d delegateEnv) AsEnv() []string {
	set := []string{
		"CNI_COMMAND=" + d.verb, "CNI_NETNS=" + d.netns,
		"CNI_CONTAINERID=" + d.attachment.ContainerID, "CNI_IFNAME=" + d.attachment.IfName,
	}
	var env []string
	for _, kv := range os.Environ() {
		ours := false
		for _, s := range set {
			key, _, _ := strings.Cut(s, "=")
			ours = ours || strings.HasPrefix(kv, key+"=")
		}
		if !ours {
			env = append(env, kv)
		}
	}
	return append(env, set...)
}
