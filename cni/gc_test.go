package cni_test

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"

	"culvert/internal/api"
	"culvert/internal/api/readiness"
	"culvert/internal/lab"
)

// store returns the path of a file in host-local's directory of the network.
func (h host) store(name string) string { return filepath.Join(h.StateDir, "networks", "net", name) }

// leave writes a file with a modification time one minute ago: GC keeps newer ones.
func leave(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	past := time.Now().Add(-time.Minute)
	if err := os.Chtimes(path, past, past); err != nil {
		t.Fatal(err)
	}
}

// valid returns the configuration with a list of valid attachments, each
// "container:interface".
func (h host) valid(attachments ...string) string {
	list := []map[string]string{}
	for _, a := range attachments {
		id, ifname, _ := strings.Cut(a, ":")
		list = append(list, map[string]string{"containerID": id, "ifname": ifname})
	}
	text, err := json.Marshal(list)
	if err != nil {
		panic(err)
	}
	return strings.TrimSuffix(h.netconf(), "}") + `,"cni.dev/valid-attachments":` + string(text) + "}"
}

// settle waits until a GC that starts now considers earlier files as older.
func settle() { time.Sleep(30 * time.Millisecond) }

func TestGC(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	var pods []*lab.Namespace
	for _, id := range []string{"live", "dead", "gone", "half"} {
		ns := sandbox(t, h)
		h.must(t, call{verb: "ADD", id: id, netns: ns.Path})
		pods = append(pods, ns)
	}
	h.must(t, call{verb: "ADD", id: "half", netns: pods[3].Path, ifname: "eth1"})
	if err := pods[2].Delete(); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"10.42.7.101": "leaked\r\neth0",       // the record was lost
		"10.42.7.102": "leaked-long-ago",      // old format, without an interface
		"10.42.7.103": "live",                 // old format, valid container
		"10.42.7.104": "live\r\neth7",         // invalid interface
		"10.42.7.105": "",                     // host-local was killed while writing
		"10.42.7.106": "  ",                   // unknown content
		"10.42.7.107": "what is\r\nthis file", // unknown content
		"notes.txt":   "leaked\r\neth0",       // not an address
		"fe80::1%lo":  "leaked\r\neth0",       // not an address
	} {
		leave(t, h.store(name), text)
	}
	settle()
	// Possibly of an ADD after the runtime created the list.
	if err := os.WriteFile(h.store("10.42.7.108"), []byte("new\r\neth0"), 0o600); err != nil {
		t.Fatal(err)
	}
	future := time.Now().Add(time.Minute)
	if err := os.Chtimes(h.store("10.42.7.108"), future, future); err != nil {
		t.Fatal(err)
	}
	leave(t, filepath.Join(h.dataDir(), "damaged:eth0"), "{")
	if err := os.WriteFile(filepath.Join(h.dataDir(), "elsewhere"), []byte(`{"name":"other","type":"bridge"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	settle()

	// Without a list or with an empty one, nothing is released.
	before := h.addresses()
	for _, stdin := range []string{h.netconf(), h.valid(), strings.Replace(h.valid(), "[]", "null", 1)} {
		a := h.must(t, call{verb: "GC", stdin: stdin})
		if got := h.addresses(); !slices.Equal(got, before) || !strings.Contains(a.stderr, "gcEmptyMeansAll") {
			t.Errorf("GC without valid attachments left %q of %q; standard error %q", got, before, a.stderr)
		}
	}
	// A malformed list is an error.
	if a := h.run(t, call{verb: "GC", stdin: h.valid("live:eth0", ":eth0")}); a.err == nil || a.err.Code != types.ErrInvalidNetworkConfig {
		t.Errorf("GC with an attachment without a containerID: %v", a.err)
	}
	// An address is kept while its interface cannot be removed.
	empty := t.TempDir()
	if a := h.run(t, call{verb: "GC", stdin: h.valid("live:eth0", "half:eth1"), path: empty}); a.err == nil || !strings.Contains(a.err.Details, "container dead, interface eth0") {
		t.Errorf("GC without the delegate: %v", a.err)
	}
	if got := h.addresses(); !slices.Contains(got, "10.42.7.3") || slices.Contains(got, "10.42.7.101") {
		t.Errorf("GC without the delegate left %q", got)
	}

	h.must(t, call{verb: "GC", stdin: h.valid("live:eth0", "half:eth1")})
	kept := []string{"10.42.7.103", "10.42.7.106", "10.42.7.107", "10.42.7.108", "10.42.7.2", "10.42.7.6", "fe80::1%lo", "notes.txt"}
	h.expect(t, "after GC", []string{"damaged:eth0", "elsewhere", "half:eth1", "live:eth0"}, kept)
	for _, f := range []string{"lock", "last_reserved_ip.0"} {
		if _, err := os.Stat(h.store(f)); err != nil {
			t.Errorf("GC removed a file of host-local: %v", err)
		}
	}
	if got := links(t, pods[1]); slices.Contains(got, "eth0") {
		t.Errorf("the dead container still has %v", got)
	}
	if got := links(t, pods[3]); !slices.Contains(got, "eth1") || slices.Contains(got, "eth0") {
		t.Errorf("the container with one valid interface has %v", got)
	}
	if got := linksOnce(t, h.Namespace, 5); len(got) != 5 { // lo, eth0, cni0, and two pods'
		t.Errorf("the node has the links %v", got)
	}
	settle()

	all := strings.TrimSuffix(h.valid(), "}") + `,"gcEmptyMeansAll":true}`
	h.must(t, call{verb: "GC", stdin: all})
	h.expect(t, "after GC of everything", []string{"damaged:eth0", "elsewhere"}, []string{"10.42.7.106", "10.42.7.107", "10.42.7.108", "fe80::1%lo", "notes.txt"})
}

// fromEarlierBoot changes a record as if an earlier boot had written it.
func fromEarlierBoot(t *testing.T, path string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var r map[string]any
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	r["boot"] = "00000000-0000-0000-0000-000000000000"
	if text, err = json.Marshal(r); err != nil {
		t.Fatal(err)
	}
	leave(t, path, string(text))
}

// What an earlier boot left is released even if the list is empty.
func TestGCAfterReboot(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	for _, id := range []string{"before", "now"} {
		h.must(t, call{verb: "ADD", id: id, netns: sandbox(t, h).Path})
	}
	fromEarlierBoot(t, filepath.Join(h.dataDir(), "before:eth0"))
	settle()
	h.must(t, call{verb: "GC", stdin: h.valid()})
	h.expect(t, "after GC", []string{"now:eth0"}, []string{"10.42.7.3"})
}

// If the plugin is killed, its delegate keeps running, and GC waits for it.
func TestGCWaitsForOrphans(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	ns := sandbox(t, h)
	// A delayed bridge plugin.
	dir, begun := t.TempDir(), filepath.Join(t.TempDir(), "begun")
	bridge := filepath.Join(h.bin, "cni", "bridge")
	script := fmt.Sprintf("#!/bin/sh\n[ $CNI_COMMAND = ADD ] && : >%s && sleep 0.5\nexec %s\n", begun, bridge)
	if err := os.WriteFile(filepath.Join(dir, "bridge"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	path := dir + ":" + filepath.Join(h.bin, "cni")
	cmd := exec.Command(filepath.Join(h.bin, "culvert-cni"))
	cmd.Env = append(os.Environ(), "CNI_COMMAND=ADD", "CNI_CONTAINERID=orphan", "CNI_NETNS="+ns.Path, "CNI_IFNAME=eth0", "CNI_PATH="+path)
	cmd.Stdin = strings.NewReader(h.netconf())
	if err := h.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(begun); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the delegate was not started")
		}
	}
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	settle()
	h.must(t, call{verb: "GC", stdin: h.valid("another:eth0")})
	h.expect(t, "after GC", nil, nil)
	if got := links(t, ns); slices.Contains(got, "eth0") {
		t.Errorf("the container has %v", got)
	}
}

func TestStaleBridge(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	first, second := sandbox(t, h), (*lab.Namespace)(nil)
	h.must(t, call{verb: "ADD", id: "c1", netns: first.Path})
	second = sandbox(t, h)
	h.lease(t, "10.42.9.0/24")

	says := "the bridge cni0 has the address 10.42.7.1/24, but this node's subnet is 10.42.9.0/24 now, and 1 interfaces are still on the bridge"
	a := h.run(t, call{verb: "ADD", id: "c2", netns: second.Path})
	if a.err == nil || a.err.Code != types.ErrTryAgainLater || a.err.Msg != says || !strings.Contains(a.err.Details, "drain the node") {
		t.Errorf("ADD with pods of another subnet: %+v", a.err)
	}
	if a := h.run(t, call{verb: "STATUS"}); a.err == nil || a.err.Code != 50 || a.err.Msg != says {
		t.Errorf("STATUS: %+v", a.err)
	}
	h.expect(t, "after the refusal", []string{"c1:eth0"}, []string{"10.42.7.2"})

	h.must(t, call{verb: "DEL", id: "c1", netns: first.Path})
	h.must(t, call{verb: "STATUS"})
	h.must(t, call{verb: "ADD", id: "c2", netns: second.Path})
	h.expect(t, "in the new subnet", []string{"c2:eth0"}, []string{"10.42.9.2"})
	var has []string
	if err := h.Do(func() error {
		cni0, err := netlink.LinkByName("cni0")
		if err != nil {
			return err
		}
		addresses, err := netlink.AddrList(cni0, netlink.FAMILY_V4)
		for _, a := range addresses {
			has = append(has, a.IPNet.String())
		}
		return err
	}); err != nil || !slices.Equal(has, []string{"10.42.9.1/24"}) {
		t.Errorf("the bridge has %v (%v)", has, err)
	}
}

// serveReadiness serves the query of STATUS, as the daemon does.
func serveReadiness(t *testing.T, h host, answer func() readiness.Answer) {
	t.Helper()
	l, err := net.Listen("unix", readiness.SocketPath(h.RunDir))
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: api.ReadinessHandler(answer), ReadHeaderTimeout: time.Second}
	go func() { _ = s.Serve(l) }() // until Close
	t.Cleanup(func() { _ = s.Close() })
}

func TestStatus(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	lease := func(expires time.Time) {
		env, err := os.ReadFile(h.SubnetFile())
		if err != nil {
			t.Fatal(err)
		}
		text, _, _ := strings.Cut(string(env), "CULVERT")
		if !expires.IsZero() {
			text += "CULVERT_LEASE_EXPIRES=" + expires.UTC().Format(time.RFC3339) + "\n"
		}
		if err := os.WriteFile(h.SubnetFile(), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	unavailable := func(what, says string) {
		t.Helper()
		if a := h.run(t, call{verb: "STATUS"}); a.err == nil || a.err.Code != 50 || !strings.Contains(a.err.Msg, says) {
			t.Errorf("STATUS, %s: %+v, want %q", what, a.err, says)
		}
	}
	// A file of flannel's: there is no daemon to query.
	h.must(t, call{verb: "STATUS"})
	lease(time.Now().Add(time.Hour))
	unavailable("no daemon", "no daemon answers on")

	var answer atomic.Pointer[readiness.Answer]
	answer.Store(&readiness.Answer{Code: readiness.NoLease, Reason: "this node has no lease yet: leasing a subnet"})
	hang := make(chan struct{})
	serveReadiness(t, h, func() readiness.Answer {
		if answer.Load().Code == "hang" {
			<-hang
		}
		return *answer.Load()
	})
	unavailable("no lease", "this node has no lease yet: leasing a subnet")
	answer.Store(&readiness.Answer{Ready: true})
	h.must(t, call{verb: "STATUS"})
	lease(time.Now().Add(-time.Hour))
	unavailable("the lease in the file expired", "expired at")
	lease(time.Now().Add(time.Hour))

	// STATUS returns in time even if the daemon or the delegate hangs.
	slow := t.TempDir()
	if err := os.WriteFile(filepath.Join(slow, "bridge"), []byte("#!/bin/sh\nsleep 5 &\nwait\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		code readiness.Code
		call call
		says string
	}{
		{"", call{verb: "STATUS", path: slow}, "delegate bridge: STATUS timed out"},
		{"hang", call{verb: "STATUS"}, "does not answer"},
	} {
		answer.Store(&readiness.Answer{Ready: true, Code: c.code})
		start := time.Now()
		a := h.run(t, c.call)
		took := time.Since(start)
		if a.err == nil || a.err.Code != 50 || !strings.Contains(a.err.Msg, c.says) {
			t.Errorf("STATUS: %+v, want %q", a.err, c.says)
		}
		// The limit is 900 ms; the rest allows for a busy machine.
		if took > 3*time.Second {
			t.Errorf("STATUS (%s) took %s", c.says, took)
		}
	}
	close(hang)
}
