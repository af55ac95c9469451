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

// Install installs the plugin, its delegates and a network configuration list for a
// container runtime.
type Install struct {
	// From is the directory of culvert-cni; its subdirectory cni, if it exists,
	// contains the delegates.
	From string
	// BinDir and ConfDir are the runtime's directories; usually /opt/cni/bin and
	// /etc/cni/net.d.
	BinDir, ConfDir string
	// ConfName is the file name in ConfDir; a runtime uses the first by name.
	ConfName string
	// SubnetFile is written to the configuration unless it is the default.
	SubnetFile string
	// Network is the configuration's name; default "culvert". host-local stores
	// reservations under it. DataDir is the directory of the plugin's records, written
	// to the configuration unless empty. On a node with running pods of flannel's, set
	// both to flannel's (cbr0, /var/lib/cni/flannel), so that no address is assigned
	// twice.
	Network, DataDir string
	// WhenReady leaves the configuration to the daemon, which publishes it when pods
	// can be added (Publish). A configuration that is in place already stays, unless
	// SubnetFile is missing: then no daemon has served since boot.
	WhenReady bool
	// RunDir is the daemon's run directory, written to the configuration unless it
	// is empty or SubnetFile's directory.
	RunDir string
}

// PluginName is the plugin's file name and its type in a configuration.
const PluginName = "culvert-cni"

// Run installs. It replaces the plugin by rename, so that a runtime never sees an
// incomplete file. It keeps existing delegates, since they may be newer or patched.
// It writes the configuration last, since the runtime then starts to add pods. It
// returns the files written, and warnings for the operator.
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
	own := filepath.Join(i.BinDir, PluginName)
	if err := copyProgram(filepath.Join(i.From, PluginName), own); err != nil {
		return done, nil, err
	}
	done = append(done, own)
	for _, source := range delegates {
		target := filepath.Join(i.BinDir, filepath.Base(source))
		if _, err := os.Stat(target); err == nil {
			continue
		}
		if err := i.putDelegate(source, target); err != nil {
			return done, nil, err
		}
		done = append(done, target)
	}
	conf := filepath.Join(i.ConfDir, i.ConfName)
	text, err := i.conflist()
	if err != nil {
		return done, nil, err
	}
	if i.WhenReady {
		if _, err := os.Stat(i.SubnetFile); errors.Is(err, fs.ErrNotExist) {
			if err := os.Remove(conf); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return done, nil, fmt.Errorf("removing the network configuration until the daemon is ready: %w", err)
			}
		}
		conf += pending
	}
	if err := statefile.Write(conf, text, 0o644); err != nil {
		return done, nil, fmt.Errorf("writing the network configuration: %w", err)
	}
	warnings, err = i.rivals()
	return append(done, conf), warnings, err
}

// putDelegate installs a delegate. One that is culvert-cni under another name
// becomes a hard link to it, which stays when culvert-cni is replaced.
func (i Install) putDelegate(source, target string) error {
	is, err := os.Stat(source)
	if err != nil {
		return fmt.Errorf("installing %s: %w", filepath.Base(source), err)
	}
	if own, err := os.Stat(filepath.Join(i.From, PluginName)); err == nil && os.SameFile(is, own) {
		err := os.Link(filepath.Join(i.BinDir, PluginName), target)
		if err == nil || errors.Is(err, fs.ErrExist) {
			return nil
		}
		// A file system without links: a copy.
	}
	return copyProgram(source, target)
}

// pending is the suffix of a configuration that waits for the daemon. Runtimes
// read .conf, .conflist and .json only.
const pending = ".pending"

// Publish puts the configurations in place that Run left to the daemon, and
// returns their paths.
func Publish(confDir string) (done []string, err error) {
	waiting, err := filepath.Glob(filepath.Join(confDir, "*"+pending))
	if err != nil {
		return nil, err
	}
	for _, path := range waiting {
		conf := strings.TrimSuffix(path, pending)
		if err := os.Rename(path, conf); err != nil {
			return done, fmt.Errorf("publishing the network configuration: %w", err)
		}
		done = append(done, conf)
	}
	return done, nil
}

// Remove removes first the configuration, then the plugin. It keeps the delegates,
// which other configurations may use.
func (i Install) Remove() (done []string, err error) {
	for _, path := range []string{filepath.Join(i.ConfDir, i.ConfName), filepath.Join(i.ConfDir, i.ConfName+pending), filepath.Join(i.BinDir, PluginName)} {
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

// conflist returns flannel's default configuration list, with culvert's plugin.
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
		// A runtime that knows cniVersions uses the newest it supports; containerd before
		// 2.0 supports up to 1.0.0.
		"name": cmp.Or(i.Network, "culvert"), "cniVersion": "1.0.0", "cniVersions": []string{"0.4.0", "1.0.0", "1.1.0"},
		"plugins": []any{plugin, map[string]any{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}}},
	}, "", "  ")
	return append(text, '\n'), err
}

// rivals lists the configurations that the runtime would use instead of ours.
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
