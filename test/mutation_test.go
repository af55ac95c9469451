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
	etcdTests = "TestLostRace|TestRacing|TestWriteRequires|TestDualStackRequires|TestOlderOverlapping|TestOtherNodesWrites|TestUnansweredWrite|TestLoss"
	acquire   = "subnet/etcd/acquire.go"
	hold      = "subnet/etcd/hold.go"
	packetGo  = "encap/packet.go"
)

var mutations = []mutation{
	{"transaction", "a lease overwrites what another node wrote since the read", acquire, `ifs = append(ifs, clientv3.Compare(clientv3.ModRevision(key), "=", choice.Keep.ModRevision))`, `_ = key`, "./subnet/etcd", etcdTests, false},
	{"transaction", "an IPv4 subnet is acquired without comparing that it is free", acquire, `return []clientv3.Cmp{clientv3.Compare(key, "=", 0).WithPrefix()}`, "_ = key\n\t\treturn nil", "./subnet/etcd", etcdTests, false},
	{"transaction", "a dual-stack subnet is acquired although other nodes wrote since the list", acquire, `clientv3.Compare(all, "<", listed+1).WithPrefix(),`, `clientv3.Compare(all, "<", listed+1000000).WithPrefix(),`, "./subnet/etcd", etcdTests, false},
	{"transaction", "a failed transaction counts as committed", acquire, `if !resp.Succeeded {`, `if false && !resp.Succeeded {`, "./subnet/etcd", etcdTests, false},
	{"transaction", "leases that were written before ours are not compared with it", acquire, `if err := r.conflictsWithOlder(l, r.entry(kv)); err != nil {`, `if err := r.conflictsWithOlder(l, r.entry(kv)); err != nil && false {`, "./subnet/etcd", etcdTests, false},
	{"transaction", "a release deletes what another node wrote since the read", hold, `If(clientv3.Compare(clientv3.ModRevision(key), "=", e.ModRevision)).`, `If().`, "./subnet/etcd", etcdTests, false},
	{"transaction", "undoing a write that lost a race also deletes another node's later write", acquire, `If(clientv3.Compare(clientv3.ModRevision(key), "=", l.ModRevision)).`, `If().`, "./subnet/etcd", etcdTests, false},
	{"transaction", "another subnet is acquired while a transaction is unanswered", acquire, "if g.unanswered {\n\t\t\tif err", "if false {\n\t\t\tif err", "./subnet/etcd", etcdTests, false},

	{"source", "any outer source address is accepted", "encap/ingress.go", `if peer == nil || peer.Underlay.Addr() != outer {`, `if peer == nil {`, "./encap", ".", false},
	{"source", "any inner destination is accepted", "encap/ingress.go", `if !table.isLocal(p.destination(b)) {`, `if false {`, "./encap", ".", false},
	{"source", "any VNI is accepted", "encap/vxlan.go", `if binary.BigEndian.Uint32(d[4:])>>8 != self.VNI {`, `if false {`, "./encap", ".", false},
	{"source", "any inner MAC is accepted", "encap/vxlan.go", `if [6]byte(d[8:]) != self.MAC {`, `if false {`, "./encap", ".", false},
	{"source", "a pod can send with any source address", "encap/egress.go", `if !table.isLocal(p.source(b)) {`, `if false {`, "./encap", ".", false},
	{"source", "a VXLAN header without the I flag is accepted", "encap/vxlan.go", `if d[0]&vxlanFlagI == 0 {`, `if false {`, "./encap", ".", false},
	{"source", "the kernel's device accepts any pair of outer and inner source", "internal/firewall/tunnelrule.go", `lines = append(lines, all(is, right, drop("ingress-source")))`, ``, "./internal/host", "TestOnlyValidSourcePairs|TestCommands|TestSets", false},
	{"source", "the kernel's device forwards to other networks", "internal/firewall/table.go", `inner = append(inner, tunnel.unpacked())`, ``, "./test", "TestChaosInjection/vxlan/kernel", true},
	{"source", "a pod can send tunnel packets", "internal/firewall/table.go", `out = append(out, tunnel.forwarded()...)`, ``, "./test", "TestP1ForgedTunnelPackets/vxlan/kernel", true},
	{"source", "IPIP packets to another address of the host are accepted", "backend/tunnel/rawsocket.go", `Val: binary.BigEndian.Uint32(a[:]), SkipTrue: 1}`, `Val: binary.BigEndian.Uint32(a[:]), SkipTrue: 0}`, "./test", "TestChaosInjection/ipip/userspace", true},
	{"source", "a pod accepts another pod's router advertisements", "cni/routers.go", `if err := swap("0"); err != nil {`, `if err := swap("1"); err != nil {`, "./test", "TestChaosRogueRouter/userspace", true},

	{"length", "IPv4: the length exceeds the packet", packetGo, `p.ipLen < 20 || p.length < p.ipLen || p.length > len(b)`, `p.ipLen < 20 || p.length < p.ipLen`, "./encap", ".", false},
	{"length", "IPv4: the header has less than 20 bytes", packetGo, `p.ipLen < 20 || p.length < p.ipLen || p.length > len(b)`, `p.length < p.ipLen || p.length > len(b)`, "./encap", ".", false},
	{"length", "IPv4: the length is less than the header's", packetGo, `p.ipLen < 20 || p.length < p.ipLen || p.length > len(b)`, `p.ipLen < 20 || p.length > len(b)`, "./encap", ".", false},
	{"length", "IPv6: the length exceeds the packet", packetGo, "if p.length > len(b) {\n\t\t\treturn false", "if false {\n\t\t\treturn false", "./encap", ".", false},
	{"length", "TCP: the data offset exceeds the packet", packetGo, `p.headLen >= p.ipLen+20 && p.headLen <= p.length`, `p.headLen >= p.ipLen+20`, "./encap", ".", false},
	{"length", "TCP: the data offset is less than 5", packetGo, `p.headLen >= p.ipLen+20 && p.headLen <= p.length`, `p.headLen <= p.length`, "./encap", ".", false},
	{"length", "UDP: the header is truncated", packetGo, `p.transport = p.headLen <= p.length`, `p.transport = true`, "./encap", ".", false},
	{"length", "VXLAN: the header is truncated", "encap/vxlan.go", `if len(d) < VXLANHeaderLen {`, `if len(d) < 8 {`, "./encap", ".", false},
	{"length", "UDP: datagrams with a wrong length are coalesced", "encap/coalesce.go", `!= 0 && int(binary.BigEndian.Uint16(b[p.ipLen+4:])) == p.length-p.ipLen`, `!= 0`, "./encap", ".", false},
	{"length", "a segment size of 0 is accepted", "encap/ingress.go", `if size <= 0 || !isPartial(b, p) && !verify(b, p) {`, `if !isPartial(b, p) && !verify(b, p) {`, "./encap", ".", false},
	{"length", "a checksum field outside the packet is accepted", "encap/segment.go", `start < 0 || offset < 0 || at+2 > len(b)`, `start < 0 || offset < 0`, "./encap", ".", false},
	{"length", "a damaged IPv4 header gets a correct checksum", "encap/ingress.go", `!p.parse(b) || !p.headerIsRight(b)`, `!p.parse(b)`, "./encap", ".", false},

	{"fsync", "a state file is renamed before its content is on disk", "internal/statefile/statefile.go", "\tif err == nil {\n\t\terr = f.Sync()\n\t}\n", "", "./internal/statefile", ".", false},
	{"fsync", "an error of syncing the file is ignored", "internal/statefile/statefile.go", `err = f.Sync()`, `_ = f.Sync()`, "./internal/statefile", ".", false},
	{"fsync", "the directory is not synced", "internal/statefile/statefile.go", `return SyncDir(filepath.Dir(path))`, `return nil`, "./internal/statefile", ".", false},
	{"fsync", "an error of syncing the directory is ignored", "internal/statefile/statefile.go", `if err := d.Sync(); err != nil {`, `if err := d.Sync(); err != nil && false {`, "./internal/statefile", ".", false},

	{"fence", "subnet.env is not removed when the lease is lost", "internal/daemon/fence.go", `return errors.Join(s.file.remove(), s.saveFence(mark))`, `return s.saveFence(mark)`, "./test", "TestFence", true},
	{"fence", "no fence mark is written when the lease is lost", "internal/daemon/fence.go", `return errors.Join(s.file.remove(), s.saveFence(mark))`, `return s.file.remove()`, "./test", "TestFence", true},
	{"fence", "the unreachable routes are removed when the lease is lost", "internal/daemon/serve.go", `return errors.Join(err, s.datapath.Close(backend.Keep), d.leaveUnreachable())`, `return errors.Join(err, s.datapath.Close(backend.Remove))`, "./test", "TestP7", true},
	{"fence", "the plugin assigns addresses of an expired lease", "cni/plugin.go", "if expired {\n", "if false && expired {\n", "./cni", "TestRefusals|TestSpecErrors|TestF5", true},
	{"fence", "a node is ready after its lease has expired", "internal/daemon/readiness.go", `case leaseExpired(s, now) != "":`, `case false:`, "./internal/daemon", "TestReadiness", false},
	{"fence", "another node's entry at our key counts as ours", hold, `return is, fmt.Errorf("%w: %s now has the subnet of %s", subnet.ErrLost, is, want)`, `return is, nil`, "./subnet/etcd", etcdTests, false},
	{"fence", "an expired lease in the snapshot file is accepted", "subnet/kept/kept.go", `if left <= 0 {`, `if false {`, "./subnet/kept", ".", false},
	{"fence", "a snapshot file of an earlier boot is accepted", "subnet/kept/kept.go", `case f.BootID != now.Boot:`, `case false:`, "./subnet/kept", ".", false},
	{"fence", "a lease's lifetime counts from the answer", hold, `l.Expires = asked.Add(ttl)`, "_ = asked\n\t\tl.Expires = time.Now().Add(ttl)", "./subnet/etcd", "TestLifetime", false},
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
