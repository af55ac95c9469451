package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"

	"culvert/cni"
	"culvert/internal/boottime"
	"culvert/internal/lab"
)

// cniStatus calls the plugin's STATUS on a node. It returns nil or an error with code
// 50 (plugin not available); another code fails the test.
func cniStatus(t *testing.T, n *lab.Node) error {
	t.Helper()
	err := n.CNI(func(c *libcni.CNIConfig, list *libcni.NetworkConfigList) error {
		return c.GetStatusNetworkList(t.Context(), list)
	})
	var e *types.Error
	if err != nil && (!errors.As(err, &e) || e.Code != 50) {
		t.Errorf("STATUS: %v, want an error with code 50", err)
	}
	return err
}

// TestCNIFollowsTheDaemon checks the plugin's answers in each state of a node:
//
//	no configuration → ready → daemon suspended (SIGSTOP) → etcd unreachable and lease
//	expired → etcd back → daemon killed
func TestCNIFollowsTheDaemon(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	n := c.Nodes[0]
	refused := func(when, says string) {
		t.Helper()
		eventually(t, when, func() error {
			if err := cniStatus(t, n); err == nil || !strings.Contains(err.Error(), says) {
				return fmt.Errorf("STATUS returns %w, want %q", err, says)
			}
			return nil
		})
	}
	ready := func(when string) {
		t.Helper()
		eventually(t, when, func() error { return cniStatus(t, n) })
	}
	d := c.start(n, "--lease-ttl", "5s")
	refused("no configuration", "this node has no lease yet: waiting for the network configuration")
	c.setConfig(config)
	ready("ready")
	pod, err := n.AddPod(t.Context(), "p1")
	if err != nil {
		t.Fatal(err)
	}

	// A daemon that hangs does not block the runtime.
	if err := d.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if err := cniStatus(t, n); err == nil || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("STATUS with a suspended daemon: %v", err)
	}
	if took := time.Since(start); took > 30*time.Second { // the timeout is 900 ms; a busy machine may take longer
		t.Errorf("STATUS took %s", took)
	}
	if err := d.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	ready("the daemon is resumed")

	// With an expired lease existing pods stay, and new ones are refused.
	c.stopEtcd()
	refused("the lease has expired", "expired at")
	var e *types.Error
	if _, err := n.AddPod(t.Context(), "p2"); !errors.As(err, &e) || e.Code != types.ErrTryAgainLater || !strings.Contains(e.Msg, "expired at") {
		t.Errorf("ADD with an expired lease: %v", err)
	}
	if err := pod.Check(t.Context()); err != nil {
		t.Errorf("CHECK with an expired lease: %v", err)
	}
	c.continueEtcd()
	ready("etcd is back")
	p2, err := n.AddPod(t.Context(), "p2")
	if err != nil {
		t.Fatal(err)
	}

	// Without a daemon the plugin is not ready, but pods can be deleted.
	if err := d.Kill(); err != nil {
		t.Fatal(err)
	}
	refused("no daemon", "no daemon answers on")
	for _, p := range []*lab.Pod{pod, p2} {
		if err := p.Delete(t.Context()); err != nil {
			t.Error(err)
		}
	}
	// When the lease expires, the plugin refuses ADD without a daemon: subnet.env has
	// the expiry time.
	refusedADD := func() error {
		env, err := cni.ReadSubnetEnv(n.SubnetFile())
		if err != nil || !expired(t, env) {
			return fmt.Errorf("subnet.env says %s: %w", env.Expires, err)
		}
		return nil
	}
	eventually(t, "the lease expires", refusedADD)
	if _, err := n.AddPod(t.Context(), "p3"); !errors.As(err, &e) || !strings.Contains(e.Msg, "expired at") {
		t.Errorf("ADD after the lease of a killed daemon expired: %v", err)
	}
}

// TestCNIInstallStatusUninstall runs `culvert cni` install, status and uninstall.
func TestCNIInstallStatusUninstall(t *testing.T) {
	c := newCluster(t, 1)
	n := c.Nodes[0]
	dir := t.TempDir()
	flags := []string{"--bin-dir", filepath.Join(dir, "bin"), "--conf-dir", filepath.Join(dir, "net.d")}
	culvert := func(args ...string) (string, error) {
		out, err := n.Run(t.Context(), filepath.Join(c.bin, "culvert"), append(append([]string{"cni"}, args...), flags...)...)
		return string(out), err
	}
	report := func() (cni.Report, error) {
		out, err := culvert("status", "-o", "json")
		var r cni.Report
		if jerr := json.Unmarshal([]byte(out), &r); jerr != nil {
			t.Fatalf("%v: %s (%v)", jerr, out, err)
		}
		return r, err
	}
	if r, err := report(); err == nil || !strings.Contains(r.NotReady, "culvert cni install") {
		t.Errorf("status before the installation: %+v (%v)", r, err)
	}
	if out, err := culvert("install", "--subnet-file", n.SubnetFile()); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if r, err := report(); err == nil || !strings.Contains(r.NotReady, "no lease yet") || r.SubnetFile != n.SubnetFile() {
		t.Errorf("status without a daemon: %+v (%v)", r, err)
	}
	c.setConfig(config)
	c.start(n)
	c.waitReady(n, 0)
	r, err := report()
	if err != nil || !r.Ready || len(r.Subnets) != 1 || !netip.MustParsePrefix("10.5.0.0/16").Overlaps(r.Subnets[0]) || r.Expires.Before(time.Now()) {
		t.Errorf("status with a daemon: %+v (%v)", r, err)
	}
	if out, err := culvert("status"); err != nil || !strings.Contains(out, "a pod can be added") || !strings.Contains(out, "0 attachments") {
		t.Errorf("status: %s (%v)", out, err)
	}
	// Another configuration sorts first, so the runtime would use it; and a delegate is
	// missing.
	if err := os.WriteFile(filepath.Join(dir, "net.d", "05-other.conf"), []byte("{}"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "bin", "host-local")); err != nil {
		t.Fatal(err)
	}
	if r, err := report(); err == nil || len(r.Rivals) != 1 || !strings.Contains(r.NotReady, "host-local: it does not exist") {
		t.Errorf("status of an incomplete installation: %+v (%v)", r, err)
	}
	if out, err := culvert("uninstall"); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if r, err := report(); err == nil || r.Ready || !strings.Contains(r.Problem, "culvert cni install") {
		t.Errorf("status after uninstalling: %+v (%v)", r, err)
	}
}

// expired reports whether the CNI plugin considers the lease in subnet.env expired.
func expired(t *testing.T, env cni.SubnetEnv) bool {
	t.Helper()
	now, err := boottime.Now()
	if err != nil {
		t.Fatal(err)
	}
	is, _ := env.Expired(now)
	return is
}
