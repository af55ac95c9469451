package cni

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestInstall(t *testing.T) {
	from, root := t.TempDir(), t.TempDir()
	write := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	read := func(path string) string {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	write(filepath.Join(from, PluginName), "new plugin")
	write(filepath.Join(from, "cni", "bridge"), "our bridge")
	write(filepath.Join(from, "cni", "host-local"), "our host-local")
	// Another name of the plugin, as make build has it.
	if err := os.Symlink(filepath.Join("..", PluginName), filepath.Join(from, "cni", "portmap")); err != nil {
		t.Fatal(err)
	}
	i := Install{From: from, BinDir: filepath.Join(root, "bin"), ConfDir: filepath.Join(root, "net.d"), ConfName: "10-culvert.conflist"}
	write(filepath.Join(i.BinDir, PluginName), "old plugin")
	write(filepath.Join(i.BinDir, "bridge"), "the distribution's bridge")
	write(filepath.Join(i.ConfDir, "05-other.conf"), "{}")

	_, warnings, err := i.Run()
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		filepath.Join(i.BinDir, PluginName):   "new plugin",
		filepath.Join(i.BinDir, "bridge"):     "the distribution's bridge",
		filepath.Join(i.BinDir, "host-local"): "our host-local",
	} {
		if got := read(path); got != want {
			t.Errorf("%s holds %q, want %q", path, got, want)
		}
	}
	own, err := os.Stat(filepath.Join(i.BinDir, PluginName))
	other, err2 := os.Lstat(filepath.Join(i.BinDir, "portmap"))
	if err != nil || err2 != nil || !os.SameFile(own, other) {
		t.Errorf("portmap is not another name of the plugin: %v, %v", err, err2)
	}
	if info, err := os.Stat(filepath.Join(i.BinDir, PluginName)); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("the plugin's mode is %v (%v)", info.Mode(), err)
	}
	conf := read(filepath.Join(i.ConfDir, i.ConfName))
	if !strings.Contains(conf, `"type": "culvert-cni"`) || strings.Contains(conf, "subnetFile") {
		t.Errorf("the configuration is\n%s", conf)
	}
	if len(warnings) != 1 || !strings.Contains(warnings[0], "05-other.conf") {
		t.Errorf("warnings: %v", warnings)
	}
	done, err := i.Remove()
	if err != nil || len(done) != 2 {
		t.Errorf("removed %v (%v)", done, err)
	}
	if done, err := i.Remove(); err != nil || len(done) != 0 {
		t.Errorf("the second Remove removed %v (%v)", done, err)
	}
}

func TestInstallWithoutThePlugin(t *testing.T) {
	i := Install{From: t.TempDir(), BinDir: t.TempDir(), ConfDir: t.TempDir(), ConfName: "10-culvert.conflist"}
	if _, _, err := i.Run(); err == nil || !strings.Contains(err.Error(), PluginName) {
		t.Errorf("error: %v", err)
	}
	if entries, err := os.ReadDir(i.ConfDir); err != nil || len(entries) != 0 {
		t.Errorf("the configuration directory holds %v (%v)", entries, err)
	}
}

// The configuration can use flannel's records of pods and addresses.
func TestInstallBesideFlannelsPods(t *testing.T) {
	i := Install{Network: "cbr0", DataDir: "/var/lib/cni/flannel"}
	text, err := i.conflist()
	var list struct {
		Name    string
		Plugins []struct{ Type, DataDir string }
	}
	if err == nil {
		err = json.Unmarshal(text, &list)
	}
	if err != nil || list.Name != "cbr0" || list.Plugins[0].Type != PluginName || list.Plugins[0].DataDir != "/var/lib/cni/flannel" {
		t.Errorf("%s, %v", text, err)
	}
}

// With WhenReady no runtime sees the configuration before the daemon serves.
func TestInstallWhenReady(t *testing.T) {
	root := t.TempDir()
	i := Install{
		From: t.TempDir(), BinDir: filepath.Join(root, "bin"), ConfDir: filepath.Join(root, "net.d"), ConfName: "10-culvert.conflist",
		SubnetFile: filepath.Join(root, "subnet.env"), WhenReady: true,
	}
	if err := os.WriteFile(filepath.Join(i.From, PluginName), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(i.ConfDir, i.ConfName)
	step := func(when string, there bool, do func() error) {
		t.Helper()
		if err := do(); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		if _, err := os.Stat(conf); (err == nil) != there {
			t.Errorf("%s: the configuration: %v", when, err)
		}
	}
	install := func() error {
		_, _, err := i.Run()
		return err
	}
	publish := func() error {
		_, err := Publish(i.ConfDir)
		return err
	}
	step("installed", false, install)
	step("the daemon is ready", true, publish)
	step("the daemon is ready again", true, publish)
	step("subnet.env is written", true, func() error { return os.WriteFile(i.SubnetFile, nil, 0o600) })
	step("an update", true, install)
	step("the updated daemon is ready", true, publish)
	step("after a boot", true, func() error { return os.Remove(i.SubnetFile) })
	step("installed after a boot", false, install)
	if done, err := i.Remove(); err != nil || len(done) != 2 {
		t.Errorf("removed %v (%v)", done, err)
	}
}
