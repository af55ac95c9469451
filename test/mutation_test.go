//go:build mutation

package test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// mutation removes or inverts a check, and names the tests that must then fail.
// The list was written before any mutation was run.
type mutation struct {
	class, what   string
	file          string // relative to the repository's root
	before, after string // before must occur exactly once in file
	pkg, run      string
	binaries      bool // the tests run the binaries
}

const (
	etcdTests = "TestLostRace|TestRacing|TestNothingIsOverwritten|TestDualStackIsTaken|TestAnOlderOverlap|TestOthersWrites|TestAnUnanswered|TestLoss"
	acquire   = "subnet/etcd/acquire.go"
	hold      = "subnet/etcd/hold.go"
	packetGo  = "encap/packet.go"
)

var mutations = []mutation{
	{"transaction", "a lease is written over what another wrote since", acquire, `ifs = append(ifs, clientv3.Compare(clientv3.ModRevision(key), "=", choice.Keep.ModRevision))`, `_ = key`, "./subnet/etcd", etcdTests, false},
	{"transaction", "an IPv4 subnet is taken without asking whether it is free", acquire, `return []clientv3.Cmp{clientv3.Compare(key, "=", 0).WithPrefix()}`, "_ = key\n\t\treturn nil", "./subnet/etcd", etcdTests, false},
	{"transaction", "a dual-stack subnet is taken although others wrote since the list", acquire, `clientv3.Compare(all, "<", listed+1).WithPrefix(),`, `clientv3.Compare(all, "<", listed+1000000).WithPrefix(),`, "./subnet/etcd", etcdTests, false},
	{"transaction", "a transaction that failed counts as one that did not", acquire, `if !resp.Succeeded {`, `if false && !resp.Succeeded {`, "./subnet/etcd", etcdTests, false},
	{"transaction", "what was written before ours is not looked at", acquire, `if err := r.conflictsWithOlder(l, r.entry(kv)); err != nil {`, `if err := r.conflictsWithOlder(l, r.entry(kv)); err != nil && false {`, "./subnet/etcd", etcdTests, false},
	{"transaction", "a release deletes what another wrote since", hold, `If(clientv3.Compare(clientv3.ModRevision(key), "=", e.ModRevision)).`, `If().`, "./subnet/etcd", etcdTests, false},
	{"transaction", "a write that came second is taken back whoever wrote since", acquire, `If(clientv3.Compare(clientv3.ModRevision(key), "=", l.ModRevision)).`, `If().`, "./subnet/etcd", etcdTests, false},
	{"transaction", "another subnet is taken while a commit is in doubt", acquire, "if g.unanswered {\n\t\t\tif err", "if false {\n\t\t\tif err", "./subnet/etcd", etcdTests, false},

	{"source", "the outer source need not be the peer's", "encap/ingress.go", `if peer == nil || peer.Underlay.Addr() != outer {`, `if peer == nil {`, "./encap", ".", false},
	{"source", "the inner destination may be anybody's", "encap/ingress.go", `if !table.isLocal(p.destination(b)) {`, `if false {`, "./encap", ".", false},
	{"source", "any VNI", "encap/vxlan.go", `if binary.BigEndian.Uint32(d[4:])>>8 != self.VNI {`, `if false {`, "./encap", ".", false},
	{"source", "any inner MAC", "encap/vxlan.go", `if [6]byte(d[8:]) != self.MAC {`, `if false {`, "./encap", ".", false},
	{"source", "a pod may send with any source", "encap/egress.go", `if !table.isLocal(p.source(b)) {`, `if false {`, "./encap", ".", false},
	{"source", "without the I flag", "encap/vxlan.go", `if d[0]&vxlanFlagI == 0 {`, `if false {`, "./encap", ".", false},
	{"source", "the kernel's device takes what is no pair", "internal/firewall/tunnelrule.go", `lines = append(lines, all(is, right, drop("ingress-source")))`, ``, "./internal/host", "TestOnlyPairs|TestCommands|TestSets", false},
	{"source", "the kernel's device is a router into other networks", "internal/firewall/table.go", `inner = append(inner, tunnel.unpacked())`, ``, "./test", "TestChaosInjection/vxlan/kernel", true},
	{"source", "a pod may send tunnel packets", "internal/firewall/table.go", `out = append(out, tunnel.forwarded()...)`, ``, "./test", "TestP1NobodyForges/vxlan/kernel", true},
	{"source", "IPIP is taken that is for another address", "backend/tunnel/rawsocket.go", `Val: binary.BigEndian.Uint32(a[:]), SkipTrue: 1}`, `Val: binary.BigEndian.Uint32(a[:]), SkipTrue: 0}`, "./test", "TestChaosInjection/ipip/userspace", true},
	{"source", "a pod believes another's router advertisement", "cni/routers.go", `if err := swap("0"); err != nil {`, `if err := swap("1"); err != nil {`, "./test", "TestChaosRogueRouter/userspace", true},

	{"length", "IPv4: longer than what came", packetGo, `p.ipLen < 20 || p.length < p.ipLen || p.length > len(b)`, `p.ipLen < 20 || p.length < p.ipLen`, "./encap", ".", false},
	{"length", "IPv4: a header of less than 20 bytes", packetGo, `p.ipLen < 20 || p.length < p.ipLen || p.length > len(b)`, `p.length < p.ipLen || p.length > len(b)`, "./encap", ".", false},
	{"length", "IPv4: shorter than its header", packetGo, `p.ipLen < 20 || p.length < p.ipLen || p.length > len(b)`, `p.ipLen < 20 || p.length > len(b)`, "./encap", ".", false},
	{"length", "IPv6: longer than what came", packetGo, "if p.length > len(b) {\n\t\t\treturn false", "if false {\n\t\t\treturn false", "./encap", ".", false},
	{"length", "TCP: an offset past the end", packetGo, `p.headLen >= p.ipLen+20 && p.headLen <= p.length`, `p.headLen >= p.ipLen+20`, "./encap", ".", false},
	{"length", "TCP: an offset of less than 5", packetGo, `p.headLen >= p.ipLen+20 && p.headLen <= p.length`, `p.headLen <= p.length`, "./encap", ".", false},
	{"length", "UDP: no whole header", packetGo, `p.transport = p.headLen <= p.length`, `p.transport = true`, "./encap", ".", false},
	{"length", "VXLAN: no whole header", "encap/vxlan.go", `if len(d) < VXLANHeaderLen {`, `if len(d) < 8 {`, "./encap", ".", false},
	{"length", "UDP: a length that is not the packet's is joined", "encap/coalesce.go", `!= 0 && int(binary.BigEndian.Uint16(b[p.ipLen+4:])) == p.length-p.ipLen`, `!= 0`, "./encap", ".", false},
	{"length", "segments of no bytes", "encap/ingress.go", `if size <= 0 || !isPartial(b, p) && !verify(b, p) {`, `if !isPartial(b, p) && !verify(b, p) {`, "./encap", ".", false},
	{"length", "a checksum outside of the packet", "encap/segment.go", `start < 0 || offset < 0 || at+2 > len(b)`, `start < 0 || offset < 0`, "./encap", ".", false},
	{"length", "a damaged header is mended", "encap/ingress.go", `!p.parse(b) || !p.headerIsRight(b)`, `!p.parse(b)`, "./encap", ".", false},

	{"fsync", "a state file is renamed before it is on the disk", "internal/statefile/statefile.go", "\tif err == nil {\n\t\terr = f.Sync()\n\t}\n", "", "./internal/statefile", ".", false},
	{"fsync", "a disk that does not take it is not noticed", "internal/statefile/statefile.go", `err = f.Sync()`, `_ = f.Sync()`, "./internal/statefile", ".", false},
	{"fsync", "the directory is not synced", "internal/statefile/statefile.go", `return SyncDir(filepath.Dir(path))`, `return nil`, "./internal/statefile", ".", false},
	{"fsync", "a directory that is not on the disk is not noticed", "internal/statefile/statefile.go", `if err := d.Sync(); err != nil {`, `if err := d.Sync(); err != nil && false {`, "./internal/statefile", ".", false},

	{"fence", "subnet.env stays when the lease is lost", "internal/daemon/fence.go", `return errors.Join(s.file.remove(), s.saveFence(mark))`, `return s.saveFence(mark)`, "./test", "TestFence", true},
	{"fence", "no mark is left when the lease is lost", "internal/daemon/fence.go", `return errors.Join(s.file.remove(), s.saveFence(mark))`, `return s.file.remove()`, "./test", "TestFence", true},
	{"fence", "pods' packets leave by the default route when the lease is lost", "internal/daemon/serve.go", `return errors.Join(err, s.datapath.Close(backend.Keep), d.leaveUnreachable())`, `return errors.Join(err, s.datapath.Close(backend.Remove))`, "./test", "TestP7", true},
	{"fence", "the plugin gives out addresses of a lease that ran out", "cni/plugin.go", "if expired {\n", "if false && expired {\n", "./cni", "TestRefusals|TestSpecErrors|TestF5", true},
	{"fence", "a node is ready past its lease's end", "internal/daemon/readiness.go", `case ranOut(s, now) != "":`, `case false:`, "./internal/daemon", "TestReadiness", false},
	{"fence", "another's entry at our key is taken for ours", hold, `return is, fmt.Errorf("%w: %s now has the subnet of %s", subnet.ErrLost, is, want)`, `return is, nil`, "./subnet/etcd", etcdTests, false},
	{"fence", "a kept lease that ran out is believed", "subnet/kept/kept.go", `if left <= 0 {`, `if false {`, "./subnet/kept", ".", false},
	{"fence", "a lease that was kept before the boot is believed", "subnet/kept/kept.go", `case f.BootID != now.Boot:`, `case false:`, "./subnet/kept", ".", false},
	{"fence", "a lease's life counts from the answer", hold, `l.Expires = asked.Add(ttl)`, "_ = asked\n\t\tl.Expires = time.Now().Add(ttl)", "./subnet/etcd", "TestLifetime", false},
}

// TestMutations applies each mutation by a build overlay, without touching
// files, and expects the tests to fail. CULVERT_MUTATIONS selects mutations by
// a substring of their names.
func TestMutations(t *testing.T) {
	top, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mutations {
		name := m.class + ": " + m.what
		if !strings.Contains(name, os.Getenv("CULVERT_MUTATIONS")) {
			continue
		}
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(top, m.file)
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if n := bytes.Count(text, []byte(m.before)); n != 1 {
				t.Fatalf("%s has %q %d times", m.file, m.before, n)
			}
			dir := t.TempDir()
			changed, overlay := filepath.Join(dir, "changed.go"), filepath.Join(dir, "overlay.json")
			if err := os.WriteFile(changed, bytes.Replace(text, []byte(m.before), []byte(m.after), 1), 0o600); err != nil {
				t.Fatal(err)
			}
			list, err := json.Marshal(map[string]any{"Replace": map[string]string{file: changed}})
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(overlay, list, 0o600); err != nil {
				t.Fatal(err)
			}
			env := append(os.Environ(), "CGO_ENABLED=0")
			do := func(args ...string) (string, error) {
				cmd := exec.Command("go", args...)
				cmd.Dir, cmd.Env = top, env
				out, err := cmd.CombinedOutput()
				return string(out), err
			}
			if m.binaries {
				bin := filepath.Join(dir, "bin")
				for target, pkg := range map[string]string{"culvert": ".", "culvert-cni": "./cni/culvert-cni"} {
					if out, err := do("build", "-overlay", overlay, "-o", filepath.Join(bin, target), pkg); err != nil {
						t.Fatalf("it does not build: %s", out)
					}
				}
				for _, rest := range []string{"culvert-etcd", "cni"} {
					if err := os.Symlink(filepath.Join(os.Getenv("CULVERT_BIN"), rest), filepath.Join(bin, rest)); err != nil {
						t.Fatal(err)
					}
				}
				env = append(env, "CULVERT_BIN="+bin)
			}
			out, err := do("test", "-vet=off", "-count", "1", "-timeout", "4m", "-overlay", overlay, "-run", m.run, m.pkg)
			switch {
			case strings.Contains(out, "[build failed]") || strings.Contains(out, "[setup failed]"):
				t.Fatalf("it does not build: %s", out)
			case err == nil:
				t.Errorf("survived: %s %s", m.pkg, m.run)
			default:
				t.Logf("| %s | %s | %s |", m.class, m.what, failedTest(out))
			}
		})
	}
}

// failedTest returns the name of a failed test.
func failedTest(out string) string {
	name := "a crash"
	for line := range strings.Lines(out) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "--- FAIL: "); ok {
			name, _, _ = strings.Cut(rest, " ")
		}
	}
	return name
}
