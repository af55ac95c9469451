package cni

import (
	"os"
	"path/filepath"
	"strings"
)

// pluginDirs are the directories that the runtime's CNI_PATH names.
func pluginDirs() []string { return filepath.SplitList(os.Getenv("CNI_PATH")) }

// delegateEnv is the environment of a delegate: ours, with another verb,
// perhaps about another container and without a namespace.
type delegateEnv struct {
	verb       string
	attachment Attachment // both empty for the verbs that concern no container
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
