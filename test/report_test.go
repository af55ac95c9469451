package test

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"culvert/internal/lab"
)

// TestReport puts a different secret into every place that a report reads, makes one
// report beside a running daemon and one after it has stopped, and checks that neither
// contains a secret, in base64 either, and that both contain what a report must have.
func TestReport(t *testing.T) {
	c := newCluster(t, 1)
	c.datapath = "kernel"
	c.setConfig(config)
	n := c.Nodes[0]
	root := t.TempDir()
	write := func(path, text string) {
		t.Helper()
		full := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(full, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	secrets := map[string]string{}
	secret := func(where string) string {
		s := fmt.Sprintf("s3cret-%02d-%s!", len(secrets), strings.ReplaceAll(where, " ", "_"))
		secrets[where] = s
		return s
	}
	key := "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIPlantedKeyMaterialThatMustNotAppearAnywhere0123456789AB\nCDEFoAoGCCqGSM49\n-----END EC PRIVATE KEY-----\n"
	secrets["a key's line"] = "MHcCAQEEIPlantedKeyMaterialThatMustNotAppearAnywhere0123456789AB"
	token := "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJwbGFudGVkIn0.cGxhbnRlZHNpZ25hdHVyZQ"
	secrets["a token"] = token
	env := secret("environment file")
	file := secret("password file")
	write("/etc/culvert/password", file+"\n")
	write("/etc/culvert/client-key.pem", key)
	write("/etc/culvert/culvert.env", "CULVERT_ETCD_USERNAME=root\nCULVERT_ETCD_PASSWORD="+env+"\nCULVERT_ETCD_PASSWORD_FILE=/etc/culvert/password\nCULVERT_ETCD_KEYFILE=/etc/culvert/client-key.pem\n"+
		"CULVERT_ETCD_ENDPOINTS=https://admin:"+url.QueryEscape(secret("url"))+"@192.0.2.1:2379\nNOTE="+base64.StdEncoding.EncodeToString([]byte("root:"+env))+"\n"+
		"AGAIN="+base64.StdEncoding.EncodeToString([]byte(file))+"\nKEY="+base64.StdEncoding.EncodeToString([]byte(key))+"\n")
	write("/etc/systemd/system/culvert.service", "[Service]\nExecStart=/usr/local/bin/culvert run --etcd-password "+secret("unit flag")+"\nEnvironment=CULVERT_ETCD_PASSWORD="+secret("unit environment")+"\n")
	write("/etc/systemd/system/culvert.service.d/x.conf", "[Service]\nEnvironment=\"AUTHORIZATION=Bearer "+token+"\"\n")
	conf := t.TempDir()
	write2 := func(name, text string) {
		if err := os.WriteFile(filepath.Join(root, conf, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(root, conf), 0o755); err != nil {
		t.Fatal(err)
	}
	write2("10-culvert.conflist", `{"name":"culvert","plugins":[{"type":"culvert-cni","password":"`+secret("conflist")+`","kubernetes":{"token":"`+token+`"}}]}`)
	write2("05-other.conf", key)

	flag := secret("flag")
	secrets["variable"] = "planted-variable-secret"
	c.starts++
	daemon, err := n.Start(lab.Command{
		Name: n.ID + "-report", Path: filepath.Join(c.bin, "culvert"), Env: []string{"CULVERT_PLANTED_TOKEN=planted-variable-secret"},
		Args: []string{"run", "--node-id", n.ID, "--run-dir", n.RunDir, "--etcd-endpoints", c.endpoint, "--datapath", "kernel", "--etcd-username", "root", "--etcd-password", flag},
	})
	if err != nil {
		t.Fatal(err)
	}
	// It does not matter here whether etcd requires the password.
	eventually(t, "the daemon answers", func() error {
		_, err := c.status(n)
		return err
	})
	make := func() map[string]string {
		t.Helper()
		path := filepath.Join(t.TempDir(), "r.tar.gz")
		began := time.Now()
		if out, err := n.Run(t.Context(), filepath.Join(c.bin, "culvert"), "report", path, "--run-dir", n.RunDir, "--root", root, "--cni-conf-dir", conf); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if took := time.Since(began); took > time.Minute {
			t.Errorf("it took %s", took)
		}
		return unpack(t, path)
	}
	look := func(files map[string]string, wanted ...string) {
		t.Helper()
		for _, want := range wanted {
			if strings.TrimSpace(files[want]) == "" {
				t.Errorf("%s is not in it, or is empty; README:\n%s", want, files["README.txt"])
			}
		}
		for name, text := range files {
			for where, s := range secrets {
				for offset := range 3 {
					code := base64.StdEncoding.EncodeToString([]byte(strings.Repeat("x", offset) + s))
					core := code[(offset*8+5)/6 : (offset+len(s))*8/6]
					if strings.Contains(text, core) {
						t.Errorf("%s has the secret of %s in base64", name, where)
					}
				}
				if strings.Contains(text, s) || strings.Contains(text, url.QueryEscape(s)) {
					t.Errorf("%s has the secret of %s", name, where)
				}
			}
		}
	}
	common := []string{
		"README.txt", "version.txt", "status.txt", "doctor.json", "doctor.txt", "state/told.json", "config/etc_culvert_culvert.env", "config/etc_systemd_system_culvert.service",
		"kernel/links.jsonl", "kernel/addresses.jsonl", "kernel/routes.jsonl", "kernel/rules.jsonl", "kernel/sysctl-net.txt", "kernel/snmp.txt",
	}
	files := make()
	look(files, append(common, "status.json", "logs/daemon.txt", "process/cmdline.txt", "process/environ.txt", "metrics.txt")...)
	for name, want := range map[string]string{
		"process/cmdline.txt": "--etcd-username\nroot", "logs/daemon.txt": "underlay found", "metrics.txt": "culvert_ready",
		"config/etc_culvert_culvert.env": "CULVERT_ETCD_KEYFILE=/etc/culvert/client-key.pem", "kernel/sysctl-net.txt": "net/ipv4/ip_forward = ",
	} {
		if !strings.Contains(files[name], want) {
			t.Errorf("%s lacks %q:\n%.600s", name, want, files[name])
		}
	}
	if err := daemon.Stop(); err != nil {
		t.Fatal(err)
	}
	files = make()
	look(files, common...)
	if !strings.Contains(files["status.txt"], "no daemon answers") {
		t.Errorf("status.txt without a daemon: %s", files["status.txt"])
	}
}

// TestReportWithoutPrograms makes a report on a host without ip, nft and other programs:
// it contains what the kernel reports, and names the programs that are missing.
func TestReportWithoutPrograms(t *testing.T) {
	c := newCluster(t, 1)
	c.datapath = "kernel"
	c.setConfig(config)
	n := c.Nodes[0]
	c.start(n)
	c.waitReady(n, 0)
	path := filepath.Join(t.TempDir(), "r.tar.gz")
	p, err := n.Start(lab.Command{Name: "report", Path: filepath.Join(c.bin, "culvert"), Args: []string{"report", path, "--run-dir", n.RunDir}, Env: []string{"PATH=" + t.TempDir()}})
	if err != nil {
		t.Fatal(err)
	}
	<-p.Exited()
	said := p.Tail(5)
	if err := p.Err(); err != nil || !strings.Contains(said, "not installed here: ip, bridge, nft, ") {
		t.Errorf("%v: %s", err, said)
	}
	files := unpack(t, path)
	for name, want := range map[string]string{
		"README.txt": "programs/nft.txt: there is no program nft here", "kernel/nftables.jsonl": `"Table":"culvert","Chain":"input"`,
		"kernel/links.jsonl": "cvt.1", "kernel/routes.jsonl": "10.5.0.0", "status.txt": "ready", "doctor.txt": "ok",
	} {
		if !strings.Contains(files[name], want) {
			t.Errorf("%s lacks %q:\n%.1000s", name, want, files[name])
		}
	}
}

// unpack reads an archive, less the name of its directory.
func unpack(t *testing.T, path string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for path, f := range untar(t, z) {
		_, name, _ := strings.Cut(path, "/")
		files[name] = string(f.content)
		if len(f.content) > 3<<20 {
			t.Errorf("%s has %d bytes", name, len(f.content))
		}
	}
	return files
}
