//go:build release

package test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

// released is the directory of `make release`, read only. VERSION is what it was given.
func released(t *testing.T) (dir, version string) {
	t.Helper()
	dir, version = os.Getenv("CULVERT_RELEASE"), os.Getenv("CULVERT_VERSION")
	if dir == "" || version == "" {
		t.Fatal("CULVERT_RELEASE and CULVERT_VERSION are not set: run make test-release")
	}
	return dir, version
}

// machines says how the programs of each architecture must look, and what the packages
// call it.
var machines = map[string]struct {
	machine  elf.Machine
	class    elf.Class
	data     elf.Data
	deb, rpm string
}{
	"amd64":   {elf.EM_X86_64, elf.ELFCLASS64, elf.ELFDATA2LSB, "amd64", "x86_64"},
	"arm64":   {elf.EM_AARCH64, elf.ELFCLASS64, elf.ELFDATA2LSB, "arm64", "aarch64"},
	"arm":     {elf.EM_ARM, elf.ELFCLASS32, elf.ELFDATA2LSB, "armhf", "armv7hl"},
	"riscv64": {elf.EM_RISCV, elf.ELFCLASS64, elf.ELFDATA2LSB, "riscv64", "riscv64"},
	"s390x":   {elf.EM_S390, elf.ELFCLASS64, elf.ELFDATA2MSB, "s390x", "s390x"},
	"ppc64le": {elf.EM_PPC64, elf.ELFCLASS64, elf.ELFDATA2LSB, "ppc64el", "ppc64le"},
}

// archives returns the files of each architecture's archive, without its top directory.
func archives(t *testing.T) map[string]map[string]tarred {
	t.Helper()
	dir, version := released(t)
	found, err := filepath.Glob(filepath.Join(dir, "culvert-"+strings.TrimPrefix(version, "v")+"-linux-*.tar.gz"))
	if err != nil || len(found) == 0 {
		t.Fatalf("%s has no archive of %s (%v)", dir, version, err)
	}
	all := make(map[string]map[string]tarred)
	for _, file := range found {
		arch := strings.TrimSuffix(file[strings.LastIndexByte(file, '-')+1:], ".tar.gz")
		if _, known := machines[arch]; !known {
			t.Fatalf("%s is for %s, which nothing here knows", file, arch)
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		z, err := gzip.NewReader(bytes.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		all[arch] = make(map[string]tarred)
		for name, f := range untar(t, z) {
			if _, inside, ok := strings.Cut(name, "/"); ok && inside != "" {
				all[arch][inside] = f
			}
		}
	}
	return all
}

// TestReleasePrograms checks that the programs of every architecture are static, for that
// architecture, without paths of the machine that made them, and stamped with the version;
// and that the bill of materials and the licences name every module linked into them.
func TestReleasePrograms(t *testing.T) {
	dir, version := released(t)
	for arch, files := range archives(t) {
		want := machines[arch]
		text, err := os.ReadFile(filepath.Join(dir, fmt.Sprintf("culvert-%s-linux-%s.cdx.json", strings.TrimPrefix(version, "v"), arch)))
		if err != nil {
			t.Fatal(err)
		}
		var bill struct {
			BOMFormat, SpecVersion, SerialNumber string
			Metadata                             struct{ Component struct{ Version string } }
			Components                           []struct {
				Name, Version string
				Licenses      []struct{ License struct{ ID string } }
			}
		}
		if err := json.Unmarshal(text, &bill); err != nil || bill.BOMFormat != "CycloneDX" || bill.SpecVersion == "" || bill.SerialNumber != "" || bill.Metadata.Component.Version != version {
			t.Fatalf("%s: the bill of materials is %+v, %v", arch, bill, err)
		}
		listed := make(map[string]bool)
		for _, c := range bill.Components {
			listed[c.Name+" "+c.Version] = true
			if len(c.Licenses) == 0 || c.Licenses[0].License.ID == "" {
				t.Errorf("%s: %s %s has no licence", arch, c.Name, c.Version)
			}
		}
		notice := string(files["NOTICE"].content)
		for _, name := range []string{"culvert", "culvert-cni", "culvert-etcd", "cni/dhcp"} {
			program := files[name].content
			f, err := elf.NewFile(bytes.NewReader(program))
			if err != nil {
				t.Errorf("%s: %s: %v", arch, name, err)
				continue
			}
			if f.Machine != want.machine || f.Class != want.class || f.Data != want.data || f.Type != elf.ET_EXEC {
				t.Errorf("%s: %s is %v %v %v %v", arch, name, f.Machine, f.Class, f.Data, f.Type)
			}
			for _, p := range f.Progs {
				if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
					t.Errorf("%s: %s is not static: it has a segment %v", arch, name, p.Type)
				}
			}
			if f.Section(".symtab") != nil || f.Section(".debug_info") != nil {
				t.Errorf("%s: %s is not stripped", arch, name)
			}
			for _, here := range []string{must(os.Getwd()), must(os.UserHomeDir()) + "/go/", os.TempDir() + "/tmp."} {
				if here != "/go/" && bytes.Contains(program, []byte(here)) {
					t.Errorf("%s: %s contains the path %s", arch, name, here)
				}
			}
			info, err := buildinfo.Read(bytes.NewReader(program))
			if err != nil {
				t.Errorf("%s: %s: %v", arch, name, err)
				continue
			}
			for _, s := range info.Settings {
				if s.Key == "GOARCH" && s.Value != arch || s.Key == "CGO_ENABLED" && s.Value != "0" || s.Key == "GOARM" && !strings.HasPrefix(s.Value, "7") || strings.HasPrefix(s.Key, "vcs") {
					t.Errorf("%s: %s was built with %s=%s", arch, name, s.Key, s.Value)
				}
			}
			for _, m := range info.Deps {
				if key := m.Path + " " + m.Version; !listed[key] || !strings.Contains(notice, "\n"+key+"\n") {
					t.Errorf("%s: %s contains %s, which the bill of materials or NOTICE lacks", arch, name, key)
				}
			}
			if name == "culvert" && !bytes.Contains(program, []byte(version)) {
				t.Errorf("%s: culvert does not contain the version %s", arch, version)
			}
		}
		for _, name := range []string{"bridge", "host-local", "loopback", "portmap", "bandwidth", "tuning", "static"} {
			if link := files["cni/"+name].link; link != "../culvert-cni" {
				t.Errorf("%s: cni/%s leads to %q", arch, name, link)
			}
		}
		for _, name := range []string{"LICENSE", "README.md", "CHANGELOG.md", "culvert.service", "culvert.env"} {
			if len(files[name].content) == 0 {
				t.Errorf("%s: the archive lacks %s", arch, name)
			}
		}
	}
}

func must(s string, err error) string {
	if err != nil {
		panic(err)
	}
	return s
}

// TestReleaseChecksums checks that SHA256SUMS names every file, with its hash.
func TestReleaseChecksums(t *testing.T) {
	dir, _ := released(t)
	f, err := os.Open(filepath.Join(dir, "SHA256SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var named []string
	for s := bufio.NewScanner(f); s.Scan(); {
		sum, name, _ := strings.Cut(s.Text(), "  ")
		content, err := os.ReadFile(filepath.Join(dir, name))
		if got := fmt.Sprintf("%x", sha256.Sum256(content)); err != nil || got != sum {
			t.Errorf("%s: %s, SHA256SUMS says %s (%v)", name, got, sum, err)
		}
		named = append(named, name)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != "SHA256SUMS" && !slices.Contains(named, e.Name()) {
			t.Errorf("SHA256SUMS lacks %s", e.Name())
		}
	}
}

// TestReleaseImage checks that the image has an entry for every architecture, with the
// programs that its archive has.
func TestReleaseImage(t *testing.T) {
	dir, version := released(t)
	f, err := os.Open(filepath.Join(dir, "culvert-"+strings.TrimPrefix(version, "v")+"-image.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	blobs := untar(t, f)
	type pointer struct {
		MediaType, Digest string
		Platform          struct{ Architecture, Variant string }
	}
	var index struct{ Manifests []pointer }
	follow := func(p pointer, v any) []byte {
		t.Helper()
		content := blobs["blobs/"+strings.Replace(p.Digest, ":", "/", 1)].content
		if fmt.Sprintf("sha256:%x", sha256.Sum256(content)) != p.Digest {
			t.Fatalf("the image lacks the blob %+v", p)
		}
		if v != nil {
			if err := json.Unmarshal(content, v); err != nil {
				t.Fatal(err)
			}
		}
		return content
	}
	if err := json.Unmarshal(blobs["index.json"].content, &index); err != nil {
		t.Fatal(err)
	}
	if len(index.Manifests) == 1 && strings.HasSuffix(index.Manifests[0].MediaType, "index.v1+json") {
		follow(index.Manifests[0], &index)
	}
	all := archives(t)
	seen := make(map[string]bool)
	for _, m := range index.Manifests {
		var manifest struct{ Layers []pointer }
		follow(m, &manifest)
		z, err := gzip.NewReader(bytes.NewReader(follow(manifest.Layers[0], nil)))
		if err != nil {
			t.Fatal(err)
		}
		layer, arch := untar(t, z), m.Platform.Architecture
		seen[arch] = true
		for _, name := range []string{"culvert", "culvert-cni"} {
			if got := layer[name].content; len(got) == 0 || !bytes.Equal(got, all[arch][name].content) {
				t.Errorf("%s: the image's %s (%d bytes) is not the archive's", arch, name, len(got))
			}
		}
		if layer["cni/bridge"].link != "../culvert-cni" || arch == "arm" && m.Platform.Variant != "v7" {
			t.Errorf("%s %s: cni/bridge leads to %q", arch, m.Platform.Variant, layer["cni/bridge"].link)
		}
		if _, has := layer["cni/dhcp"]; has {
			t.Errorf("%s: the image has the dhcp plugin", arch)
		}
	}
	if got, want := slices.Sorted(maps.Keys(seen)), slices.Sorted(maps.Keys(all)); !slices.Equal(got, want) {
		t.Errorf("the image is for %v, the archives for %v", got, want)
	}
}

// packageFile returns the .deb or .rpm of an architecture.
func packageFile(t *testing.T, arch, kind string) string {
	t.Helper()
	dir, _ := released(t)
	pattern := "culvert_*_" + machines[arch].deb + ".deb"
	if kind == "rpm" {
		pattern = "culvert-*." + machines[arch].rpm + ".rpm"
	}
	found, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(found) != 1 {
		t.Fatalf("%s in %s: %v %v", pattern, dir, found, err)
	}
	return found[0]
}

func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// TestReleasePackages checks that the .deb and the .rpm of every architecture say so, hold
// the same files, and mark the configuration as such.
func TestReleasePackages(t *testing.T) {
	for arch := range archives(t) {
		deb, rpm := packageFile(t, arch, "deb"), packageFile(t, arch, "rpm")
		if got := strings.TrimSpace(output(t, "dpkg-deb", "--field", deb, "Architecture")); got != machines[arch].deb {
			t.Errorf("%s is for %s", deb, got)
		}
		version := strings.TrimSpace(output(t, "dpkg-deb", "--field", deb, "Version"))
		output(t, "dpkg", "--validate-version", version)
		if got := strings.TrimSpace(output(t, "rpm", "-qp", "--nosignature", "--qf", "%{VERSION} %{ARCH}", rpm)); got != version+" "+machines[arch].rpm {
			t.Errorf("the .rpm is %q, the .deb %q", got, version)
		}
		var inDeb, inRPM []string
		for line := range strings.Lines(output(t, "dpkg-deb", "--contents", deb)) {
			fields := strings.Fields(line)
			if name := strings.TrimPrefix(fields[5], "."); !strings.HasSuffix(name, "/") {
				inDeb = append(inDeb, name)
			}
			if fields[1] != "root/root" && fields[1] != "0/0" || fields[0][5] == 'w' || fields[0][8] == 'w' {
				t.Errorf("%s: %s", deb, line)
			}
		}
		for _, name := range strings.Fields(output(t, "rpm", "-qlp", "--nosignature", rpm)) {
			if !slices.Contains([]string{"/usr/lib/culvert", "/usr/lib/culvert/cni", "/etc/culvert"}, name) { // directories
				inRPM = append(inRPM, name)
			}
		}
		for i, name := range inRPM {
			inRPM[i] = strings.Replace(name, "/zsh/site-functions/", "/zsh/vendor-completions/", 1)
		}
		slices.Sort(inDeb)
		slices.Sort(inRPM)
		if !slices.Equal(inDeb, inRPM) {
			t.Errorf("%s: the .deb has\n%v\nthe .rpm\n%v", arch, inDeb, inRPM)
		}
		for _, want := range []string{
			"/usr/bin/culvert", "/usr/lib/culvert/culvert-cni", "/usr/lib/culvert/culvert-etcd", "/usr/lib/culvert/cni/bridge", "/usr/lib/culvert/cni/dhcp",
			"/usr/lib/systemd/system/culvert.service", "/etc/culvert/culvert.env", "/usr/share/man/man8/culvert.8", "/usr/share/doc/culvert/copyright", "/usr/share/doc/culvert/NOTICE",
		} {
			if !slices.Contains(inDeb, want) {
				t.Errorf("%s: the packages lack %s", arch, want)
			}
		}
		if got := strings.TrimSpace(output(t, "rpm", "-qp", "--nosignature", "--qf", "%{BUILDHOST}", rpm)); got != "localhost" {
			t.Errorf("the .rpm says that it was built on %s", got)
		}
		if got := strings.TrimSpace(output(t, "rpm", "-qp", "--nosignature", "--configfiles", rpm)); got != "/etc/culvert/culvert.env" {
			t.Errorf("configuration in the .rpm: %s", got)
		}
		if got := strings.TrimSpace(output(t, "dpkg-deb", "--info", deb, "conffiles")); got != "/etc/culvert/culvert.env" {
			t.Errorf("configuration in the .deb: %s", got)
		}
	}
}

// systemdHost is this machine's root directory and a node's network, with a systemd of its own.
// What is written there is lost when it stops.
type systemdHost struct {
	t    *testing.T
	pid  string // of systemd
	node *lab.Node
}

const bootScript = `set -e
top=$1 run=$2
mount --make-rprivate /
mount -t tmpfs tmpfs "$top"
mkdir "$top/upper" "$top/work" "$top/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$top/upper,workdir=$top/work" "$top/root"
cd "$top/root"
mount -t proc proc proc
mount -t tmpfs tmpfs tmp
mount --bind "$run" run
mount --rbind /dev dev
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
pivot_root . mnt
umount -l /mnt
exec env -i container=lxc PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system --unit=basic.target`

// bootMachine starts systemd in a node. /run is a directory that the test sees, so that it
// can ask the daemon.
func (c *cluster) bootMachine(n *lab.Node) *systemdHost {
	c.t.Helper()
	t := c.t.(*testing.T)
	if os.Getuid() != 0 {
		t.Fatal("starting systemd needs root")
	}
	run, err := os.MkdirTemp("", "run")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(run) })
	p, err := n.Start(lab.Command{Name: "systemd", Path: "/usr/bin/unshare", Args: []string{
		"--mount", "--pid", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child", "/bin/sh", "-c", bootScript, "boot", t.TempDir(), run,
	}})
	if err != nil {
		t.Fatal(err)
	}
	m := &systemdHost{t: t, node: n}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := m.try("journalctl", "--no-pager", "-n", "60")
			t.Logf("the machine's journal:\n%s\n%s", out, p.Tail(10))
		}
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
	})
	n.RunDir = filepath.Join(run, "culvert")
	eventually(t, "systemd runs", func() error {
		child, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", p.PID))
		if err != nil {
			return err
		}
		if m.pid = strings.TrimSpace(string(child)); m.pid == "" {
			return errors.New(p.Tail(3))
		}
		if out, err := m.try("systemctl", "is-active", "basic.target"); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	return m
}

func (m *systemdHost) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--target", m.pid, "--all", "--wd=/"}, args...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive"}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (m *systemdHost) run(args ...string) string {
	m.t.Helper()
	out, err := m.try(args...)
	if err != nil {
		m.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// copyIn puts a file into the machine's /tmp, where it stays as long as the machine runs.
func (m *systemdHost) copyIn(file string) string {
	m.t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		m.t.Fatal(err)
	}
	to := path.Join("/tmp", filepath.Base(file))
	if err := os.WriteFile("/proc/"+m.pid+"/root"+to, content, 0o644); err != nil {
		m.t.Fatal(err)
	}
	return to
}

func (m *systemdHost) exists(name string) bool {
	_, err := os.Lstat("/proc/" + m.pid + "/root" + name)
	return err == nil
}

// packager is how one kind of package is built anew with a higher version, and installed.
type packager struct {
	kind                            string
	install, upgrade, remove, purge []string
}

// TestReleaseInstall installs the package on a machine with systemd, starts the unit,
// upgrades it under 100 pings a second, and removes it: the kernel datapath loses no packet,
// and the configuration stays until dpkg purges it.
//
//	pod ── n1: systemd, the package ── fabric ── n2 ── pod
func TestReleaseInstall(t *testing.T) {
	labtest.NeedTUN(t)
	for _, m := range []struct {
		packager
		datapath string
	}{
		{packager{"deb", []string{"dpkg", "-i"}, []string{"dpkg", "-i"}, []string{"dpkg", "-r", "culvert"}, []string{"dpkg", "-P", "culvert"}}, "userspace"},
		{packager{"rpm", []string{"rpm", "-i", "--nodeps"}, []string{"rpm", "-U", "--nodeps", "--replacepkgs"}, []string{"rpm", "-e", "culvert"}, nil}, "kernel"},
	} {
		t.Run(m.kind, func(t *testing.T) { testInstall(t, m.packager, m.datapath) })
	}
}

func testInstall(t *testing.T, how packager, datapath string) {
	c := newCluster(t, 2)
	c.setConfig(config)
	c.start(c.Nodes[1], "--datapath", "kernel")
	n := c.Nodes[0]
	m := c.bootMachine(n)
	_, version := released(t)

	if how.kind == "rpm" {
		m.run("rpm", "--initdb")
	}
	file := m.copyIn(packageFile(t, runtime.GOARCH, how.kind))
	m.run(append(how.install, file)...)
	if out := m.run("culvert", "version"); !strings.Contains(out, version) {
		t.Errorf("culvert version says %s, want %s", out, version)
	}
	if out, err := m.try("systemctl", "is-enabled", "culvert"); err == nil || !strings.HasPrefix(out, "disabled") {
		t.Errorf("the unit is enabled before it is configured: %s", out)
	}
	// Keys that systemd learned later are ignored by an older one.
	out, err := m.try("systemd-analyze", "verify", "/usr/lib/systemd/system/culvert.service")
	for line := range strings.Lines(out) {
		if strings.Contains(line, "culvert") && !strings.Contains(line, "'RestartSteps'") && !strings.Contains(line, "'RestartMaxDelaySec'") {
			t.Errorf("systemd-analyze verify (%v): %s", err, line)
		}
	}

	settings := fmt.Sprintf("# edited\nCULVERT_ETCD_ENDPOINTS=%s\nCULVERT_NODE_ID=n1\nCULVERT_DATAPATH=%s\n", c.endpoint, datapath)
	if err := os.WriteFile("/proc/"+m.pid+"/root/etc/culvert/culvert.env", []byte(settings), 0o640); err != nil {
		t.Fatal(err)
	}
	m.run("systemctl", "enable", "--now", "culvert")
	c.waitReady(n, 1)
	pods := c.pods()
	ping(t, pods[0], pods[1])
	started := m.run("systemctl", "show", "-P", "MainPID", "culvert")

	pings := startPings(t, pods[0], pods[1])
	if how.kind == "deb" { // rpm installs the same version anew
		m.run("sh", "-ec", "cd /tmp; dpkg-deb -R "+file+" new; sed -i 's/^Version: .*/&+newer/' new/DEBIAN/control; dpkg-deb -Znone -b new newer.deb >/dev/null")
		file = "/tmp/newer.deb"
	}
	m.run(append(how.upgrade, file)...)
	c.wait(n, "is another process after the upgrade", func(s api.Status) bool {
		pid := m.run("systemctl", "show", "-P", "MainPID", "culvert")
		return s.Ready && len(s.Peers) == 1 && pid != started && pid != "0\n" && strings.TrimSpace(m.run("systemctl", "is-active", "culvert")) == "active"
	})
	sent, lost := pings.stop()
	t.Logf("%s, %s: of %d pings during the upgrade %d were lost", how.kind, datapath, sent, lost)
	// The userspace loop may lose the packet that it holds when it is stopped, as in
	// TestUpgradeInUserspace.
	if gap := pings.gap(); datapath == "kernel" && lost > 0 || gap > 100*time.Millisecond {
		t.Errorf("the upgrade lost %d of %d pings (gap %s)", lost, sent, gap)
	}
	if kept := m.run("cat", "/etc/culvert/culvert.env"); kept != settings {
		t.Errorf("after the upgrade the configuration is\n%s", kept)
	}

	pings = startPings(t, pods[0], pods[1])
	said := m.run(how.remove...)
	sent, lost = pings.stop()
	if datapath == "kernel" && lost > 0 {
		t.Errorf("removal lost %d of %d pings", lost, sent)
	}
	if !strings.Contains(said, "culvert cleanup") {
		t.Errorf("removal said %q", said)
	}
	for _, name := range []string{"/usr/bin/culvert", "/usr/lib/culvert", "/usr/lib/systemd/system/culvert.service", "/etc/systemd/system/multi-user.target.wants/culvert.service"} {
		if m.exists(name) {
			t.Errorf("%s is left after removal", name)
		}
	}
	if out, _ := m.try("systemctl", "is-active", "culvert"); strings.TrimSpace(out) != "inactive" {
		t.Errorf("after removal the unit is %s", out)
	}
	edited := "/etc/culvert/culvert.env"
	if how.kind == "rpm" {
		edited += ".rpmsave"
	}
	if !m.exists(edited) {
		t.Errorf("%s did not stay", edited)
	}
	if how.purge != nil {
		m.run(how.purge...)
		for _, name := range []string{"/etc/culvert", "/run/culvert"} {
			if m.exists(name) {
				t.Errorf("%s is left after the purge", name)
			}
		}
	}
}
