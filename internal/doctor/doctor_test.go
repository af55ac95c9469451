package doctor_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"culvert/internal/api"
	"culvert/internal/doctor"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// healthy is a host on which every check that a test can influence passes.
func healthy(t *testing.T) doctor.Host {
	h := doctor.Host{
		Status: &api.Status{Ready: true, Datapath: api.Datapath{WireFormat: "vxlan", Kind: "kernel", MTU: 1450}},
		Port:   8472, Root: t.TempDir(),
	}
	write(t, h, "/proc/sys/net/netfilter/nf_conntrack_count", "100\n")
	write(t, h, "/proc/sys/net/netfilter/nf_conntrack_max", "1000\n")
	write(t, h, "/proc/sys/net/ipv4/neigh/default/gc_thresh3", "1024\n")
	write(t, h, "/proc/net/stat/arp_cache", "entries  allocs   table_fulls\n0000000a 00000000 00000000\n0000000a 00000000 00000000\n")
	write(t, h, "/dev/net/tun", "")
	return h
}

func write(t *testing.T, h doctor.Host, path, text string) {
	t.Helper()
	full := filepath.Join(h.Root, path)
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(full, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestChecks introduces one fault at a time and expects exactly its findings
// with the right fixes, and none on the healthy host.
func TestChecks(t *testing.T) {
	node := labtest.New(t, lab.Options{Nodes: 1}).Nodes[0]
	// The clock check is ignored: it depends on the machine.
	examine := func(h doctor.Host) (found []string) {
		t.Helper()
		if err := node.Do(func() error {
			for _, r := range doctor.Examine(t.Context(), h) {
				if r.Seen == "" && len(r.Findings) == 0 {
					t.Errorf("%s says nothing", r.Check)
				}
				for _, f := range r.Findings {
					if r.Check != "clock" {
						found = append(found, fmt.Sprintf("%s %s: %s; fix: %s", f.Severity, f.Check, f.Text, f.Fix))
					}
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return found
	}
	addLink := func(l netlink.Link) func() {
		t.Helper()
		if err := node.Do(func() error { return netlink.LinkAdd(l) }); err != nil {
			t.Fatal(err)
		}
		return func() {
			if err := node.Do(func() error { return netlink.LinkDel(l) }); err != nil {
				t.Error(err)
			}
		}
	}
	nothing := func() {}
	bridge := func(name string) netlink.Link {
		a := netlink.NewLinkAttrs()
		a.Name = name
		return &netlink.Bridge{LinkAttrs: a}
	}
	for _, c := range []struct {
		name string
		make func(*doctor.Host) (undo func())
		want []string // one entry per finding: substrings in this order
	}{
		{"healthy", func(*doctor.Host) func() { return nothing }, nil},
		{"no daemon", func(h *doctor.Host) func() {
			h.Status, h.NoDaemon = nil, errors.New("no daemon answers on /run/x")
			return nothing
		}, []string{"bad daemon: no daemon answers|systemctl start culvert"}},
		{"not ready", func(h *doctor.Host) func() {
			h.Status.Ready, h.Status.NotReady = false, "leasing a subnet"
			return nothing
		}, []string{"bad daemon: it is not ready: leasing"}},
		{"a warning of the daemon's", func(h *doctor.Host) func() {
			h.Status.Warnings = []api.Warning{{Check: "forward-drop", Text: "iptables drops", Fix: "iptables -I"}}
			return nothing
		}, []string{"bad forward-drop: iptables drops; fix: iptables -I"}},
		{"a lease set aside, pods of another MTU", func(h *doctor.Host) func() {
			h.Status.Rejected = []api.Rejection{{Key: "10.5.1.0-24", Reason: "outside"}}
			h.Status.Datapath.StalePods = []string{"veth1"}
			return nothing
		}, []string{"risk daemon: the lease 10.5.1.0-24|lease check", "risk daemon: pods have another MTU|veth1|recreate"}},
		{"the store does not listen", func(h *doctor.Host) func() {
			h.Endpoints = []string{"http://127.0.0.1:1"}
			return nothing
		}, []string{"bad store-latency: http://127.0.0.1:1 cannot be reached|refused"}},
		{"another program has the port", func(*doctor.Host) func() {
			c, err := node.ListenPacket(t.Context(), "udp", "0.0.0.0:8472")
			if err != nil {
				t.Fatal(err)
			}
			return func() { _ = c.Close() }
		}, []string{"bad port-taken: UDP port 8472 is taken by doctor.test (pid|ss -lunp"}},
		{"flannel's device", func(*doctor.Host) func() {
			a := netlink.NewLinkAttrs()
			a.Name = "flannel.1"
			return addLink(&netlink.Vxlan{LinkAttrs: a, VxlanId: 1, Port: 8472})
		}, []string{"risk port-taken: flannel.1 is a vxlan device|take-over-flannel", "risk leftovers: devices of flannel exist: flannel.1|take-over-flannel"}},
		{"Calico's devices", func(*doctor.Host) func() {
			one, two := addLink(bridge("cali123")), addLink(bridge("cali456"))
			return func() { one(); two() }
		}, []string{"risk leftovers: devices of Calico exist: cali123, cali456|uninstalled"}},
		{"networkd", func(h *doctor.Host) func() {
			write(t, *h, "/run/systemd/netif/state", "")
			write(t, *h, "/etc/systemd/networkd.conf", "[Network]\nManageForeignRoutes=no\n")
			write(t, *h, "/etc/systemd/networkd.conf.d/50.conf", "[Network]\nManageForeignRoutes=yes\nManageForeignRoutingPolicyRules = No\n")
			return nothing
		}, []string{"risk network-manager: systemd-networkd|(ManageForeignRoutes)|ManageForeignRoutes=no"}},
		{"networkd that is told", func(h *doctor.Host) func() {
			write(t, *h, "/run/systemd/netif/state", "")
			write(t, *h, "/etc/systemd/networkd.conf.d/culvert.conf", "[Network]\nManageForeignRoutes=no\nManageForeignRoutingPolicyRules=no\n")
			return nothing
		}, nil},
		{"NetworkManager", func(h *doctor.Host) func() {
			write(t, *h, "/run/NetworkManager/x", "")
			return nothing
		}, []string{"risk network-manager: NetworkManager|unmanaged-devices=interface-name:cvt*"}},
		{"NetworkManager that is told", func(h *doctor.Host) func() {
			write(t, *h, "/run/NetworkManager/x", "")
			write(t, *h, "/etc/NetworkManager/conf.d/culvert.conf", "[keyfile]\nunmanaged-devices=interface-name:cvt*;interface-name:culvert*\n")
			return nothing
		}, nil},
		{"conntrack nearly full", func(h *doctor.Host) func() {
			write(t, *h, "/proc/sys/net/netfilter/nf_conntrack_count", "950")
			return nothing
		}, []string{"risk conntrack-full: |950 of 1000|nf_conntrack_max=4000"}},
		{"conntrack full", func(h *doctor.Host) func() {
			write(t, *h, "/proc/sys/net/netfilter/nf_conntrack_count", "1000")
			return nothing
		}, []string{"bad conntrack-full: |is full (1000 of 1000)|nf_conntrack_max=4000"}},
		{"neighbour table overflows", func(h *doctor.Host) func() {
			write(t, *h, "/proc/net/stat/arp_cache", "entries  table_fulls\n000003ff 00000003\n000003ff 00000010\n")
			return nothing
		}, []string{"bad neighbour-table: |overflowed 19 times (1023 of 1024 entries)|net.ipv4.neigh.default.gc_thresh3=4096"}},
		{"D4: the unit does not let subnet.env be written", func(h *doctor.Host) func() {
			h.SubnetFile = "/run/elsewhere/subnet.env"
			write(t, *h, "/run/elsewhere/x", "")
			write(t, *h, "/etc/systemd/system/culvert.service", "[Service]\nProtectSystem=strict\nRuntimeDirectory=culvert flannel\n")
			return nothing
		}, []string{"bad subnet-file: the unit /etc/systemd/system/culvert.service does not let|/run/elsewhere|ReadWritePaths=/run/elsewhere"}},
		{"D4: a drop-in lets it", func(h *doctor.Host) func() {
			h.SubnetFile = "/run/elsewhere/subnet.env"
			write(t, *h, "/run/elsewhere/x", "")
			write(t, *h, "/etc/systemd/system/culvert.service", "[Service]\nProtectSystem=strict\nRuntimeDirectory=culvert flannel\n")
			write(t, *h, "/etc/systemd/system/culvert.service.d/subnet-file.conf", "[Service]\nReadWritePaths=/run/elsewhere\n")
			return nothing
		}, nil},
		{"no pod can be added", func(h *doctor.Host) func() {
			h.CNI = "/opt/cni/bin/bridge: it is not there"
			return nothing
		}, []string{"bad cni: no pod can be added: /opt/cni/bin/bridge"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := healthy(t)
			undo := c.make(&h)
			defer undo()
			got := examine(h)
			if len(got) != len(c.want) {
				t.Fatalf("found %q", got)
			}
			for _, r := range doctor.Examine(t.Context(), h) {
				for _, f := range r.Findings {
					for _, a := range f.Actions {
						if a.Do == nil || a.Command == "" {
							t.Errorf("%s: an action that does nothing: %q", f.Check, a.Command)
						}
					}
				}
			}
			for i, want := range c.want {
				rest := got[i]
				for part := range strings.SplitSeq(want, "|") {
					_, after, ok := strings.Cut(rest, part)
					if !ok {
						t.Errorf("%q is not in %q", part, got[i])
					}
					rest = after
				}
			}
		})
	}
}

// TestStoreAnswers connects to a listening server.
func TestStoreAnswers(t *testing.T) {
	l, err := net.Listen("tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	h := healthy(t)
	h.Endpoints = []string{"http://" + l.Addr().String()}
	for _, r := range doctor.Examine(context.Background(), h) {
		if r.Check == "store-latency" && (len(r.Findings) > 0 || !strings.Contains(r.Seen, l.Addr().String())) {
			t.Errorf("%+v", r)
		}
	}
}
