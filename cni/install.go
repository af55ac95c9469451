package cni

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"culvert/internal/statefile"
)

// Install puts the plugin, the plugins that it delegates to, and a network
// configuration list where a container runtime looks for them.
type Install struct {
	// From is the directory of culvert-cni; its subdirectory cni, if there is
	// one, holds the delegates.
	From string
	// BinDir and ConfDir are the runtime's; usually /opt/cni/bin and
	// /etc/cni/net.d.
	BinDir, ConfDir string
	// ConfName is the file in ConfDir; a runtime uses the first by name.
	ConfName string
	// SubnetFile is written into the configuration unless it is the default.
	SubnetFile string
	// Network is the configuration's name, "culvert" if empty: host-local keeps
	// the addresses in use by it. DataDir is the plugin's records, written unless
	// it is empty. On a node where pods of flannel's run on, both are flannel's
	// (cbr0, /var/lib/cni/flannel), so that no address is given out twice.
	Network, DataDir string
	// RunDir is the daemon's, written unless it is SubnetFile's directory or
	// empty.
	RunDir string
}

// PluginName is the plugin's file name, and its type in a configuration.
const PluginName = "culvert-cni"

// Run installs. The plugin replaces its predecessor by rename, so that a runtime
// never meets half of it; a delegate that is there already stays, since it may be
// newer or patched; the configuration comes last, since with it pods begin to
// come. It returns what it did, and what an operator should know.
func (i Install) Run() (done, warnings []string, err error) {
	if err := os.MkdirAll(i.BinDir, 0o755); err != nil {
		return nil, nil, err
	}
	if err := os.MkdirAll(i.ConfDir, 0o755); err != nil {
		return nil, nil, err
	}
	delegates, err := filepath.Glob(filepath.Join(i.From, "cni", "*"))
	if err != nil {
		return nil, nil, err
	}
	for _, source := range append([]string{filepath.Join(i.From, PluginName)}, delegates...) {
		target := filepath.Join(i.BinDir, filepath.Base(source))
		if filepath.Base(source) != PluginName {
			if _, err := os.Stat(target); err == nil {
				continue
			}
		}
		if err := copyProgram(source, target); err != nil {
			return done, nil, err
		}
		done = append(done, target)
	}
	conf := filepath.Join(i.ConfDir, i.ConfName)
	text, err := i.conflist()
	if err != nil {
		return done, nil, err
	}
	if err := statefile.Write(conf, text, 0o644); err != nil {
		return done, nil, fmt.Errorf("writing the network configuration: %w", err)
	}
	warnings, err = i.rivals()
	return append(done, conf), warnings, err
}

// Remove takes away the configuration first, then the plugin. The delegates
// stay: others may use them.
func (i Install) Remove() (done []string, err error) {
	for _, path := range []string{filepath.Join(i.ConfDir, i.ConfName), filepath.Join(i.BinDir, PluginName)} {
		switch err := os.Remove(path); {
		case err == nil:
			done = append(done, path)
		case !errors.Is(err, fs.ErrNotExist):
			return done, err
		}
	}
	return done, nil
}

func copyProgram(source, target string) error {
	data, err := os.ReadFile(source)
	if err != nil {
		return fmt.Errorf("installing %s: %w", filepath.Base(source), err)
	}
	if err := statefile.Write(target, data, 0o755); err != nil {
		return fmt.Errorf("installing %s: %w", target, err)
	}
	return nil
}

// conflist is flannel's usual configuration list, with culvert's plugin.
func (i Install) conflist() ([]byte, error) {
	plugin := map[string]any{
		"type":     PluginName,
		"delegate": map[string]any{"hairpinMode": true, "isDefaultGateway": true},
	}
	if i.SubnetFile != "" && i.SubnetFile != DefaultsFor(PluginName).SubnetFile {
		plugin["subnetFile"] = i.SubnetFile
	}
	if i.RunDir != "" && i.RunDir != filepath.Dir(i.SubnetFile) {
		plugin["runDir"] = i.RunDir
	}
	if i.DataDir != "" && i.DataDir != DefaultsFor(PluginName).DataDir {
		plugin["dataDir"] = i.DataDir
	}
	text, err := json.MarshalIndent(map[string]any{
		// A runtime that knows cniVersions takes the newest that it has; containerd
		// before 2.0 has 1.0.0 at most.
		"name": cmp.Or(i.Network, "culvert"), "cniVersion": "1.0.0", "cniVersions": []string{"0.4.0", "1.0.0", "1.1.0"},
		"plugins": []any{plugin, map[string]any{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}}},
	}, "", "  ")
	return append(text, '\n'), err
}

// rivals names the configurations that a runtime would use before ours.
func (i Install) rivals() ([]string, error) {
	entries, err := os.ReadDir(i.ConfDir)
	if err != nil {
		return nil, err
	}
	var warnings []string
	for _, e := range entries {
		ext := filepath.Ext(e.Name())
		if slices.Contains([]string{".conf", ".conflist", ".json"}, ext) && strings.Compare(e.Name(), i.ConfName) < 0 {
			warnings = append(warnings, fmt.Sprintf("%s sorts before %s: the runtime will use it instead", filepath.Join(i.ConfDir, e.Name()), i.ConfName))
		}
	}
	return warnings, nil
}
