package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/internal/priority"
)

// unit returns the settings of the shipped systemd unit.
func unit(t *testing.T) map[string][]string {
	t.Helper()
	text, err := os.ReadFile("../deploy/systemd/culvert.service")
	if err != nil {
		t.Fatal(err)
	}
	settings := make(map[string][]string)
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(line, "#") {
			settings[key] = append(settings[key], strings.Fields(value)...)
		}
	}
	return settings
}

// asUnit starts a daemon with the unit's capabilities, LimitNICE and view of the file system:
// ProtectSystem=strict makes everything read-only except /dev, /proc, /sys and the unit's
// directories (systemd.exec(5)). /run and /var/lib are empty tmpfs mounts.
func (c *cluster) asUnit(n *lab.Node, settings map[string][]string, flags ...string) *lab.Process {
	c.t.Helper()
	var writable []string
	for _, d := range settings["RuntimeDirectory"] {
		writable = append(writable, "/run/"+d)
	}
	for _, d := range settings["StateDirectory"] {
		writable = append(writable, "/var/lib/"+d)
	}
	var nice int
	if _, err := fmt.Sscan(strings.Join(settings["LimitNICE"], ""), &nice); err != nil {
		c.t.Fatalf("the unit's LimitNICE is %q: %v", settings["LimitNICE"], err)
	}
	bounding := "-all"
	for _, k := range settings["CapabilityBoundingSet"] {
		bounding += ",+" + strings.ToLower(strings.TrimPrefix(k, "CAP_"))
	}
	for key, want := range map[string]string{"ProtectSystem": "strict", "NoNewPrivileges": "yes"} {
		if !slices.Equal(settings[key], []string{want}) {
			c.t.Fatalf("the unit's %s is %v: change the sandbox of this test too", key, settings[key])
		}
	}
	script := `set -e
mount --make-rprivate /
mount -t tmpfs run /run
mount -t tmpfs lib /var/lib
for d in ` + strings.Join(writable, " ") + `; do mkdir -p $d; mount --bind $d $d; done
awk '{print $5}' /proc/self/mountinfo | sort -r | while read -r m; do
	case $m in
	/dev|/dev/*|/proc|/proc/*|/sys|/sys/*` + func() (s string) {
		for _, w := range writable {
			s += "|" + w
		}
		return s
	}() + `) ;;
	*) mount -o remount,bind,ro "$m" 2>/dev/null || true ;;
	esac
done
if touch /run/other 2>/dev/null || touch /etc/culvert-other 2>/dev/null; then echo 'the sandbox is writable'; exit 9; fi
prlimit --nice=` + strconv.Itoa(20-nice) + ` --pid $$ 2>/dev/null || true # needs CAP_SYS_RESOURCE
exec setpriv --bounding-set ` + bounding + ` --inh-caps -all --no-new-privs "$0" "$@"`
	c.starts++
	p, err := n.Start(lab.Command{
		Name: "unit-" + strconv.Itoa(c.starts), Path: "/usr/bin/unshare",
		Args: append([]string{
			"--mount", "/bin/sh", "-c", script, filepath.Join(c.bin, "culvert"), "run", "--node-id", n.ID, "--etcd-endpoints", c.endpoint, "--confine", "kill",
		}, flags...),
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return p
}

// unitStatus waits until the status of a daemon in such a sandbox meets a condition.
func (c *cluster) unitStatus(p *lab.Process, n *lab.Node, is func(api.Status) error) {
	c.t.Helper()
	eventually(c.t, p.Name, func() error {
		select {
		case <-p.Exited():
			c.t.Fatalf("the daemon exited: %s", p.Tail(3))
		default:
		}
		cmd := exec.Command("nsenter", "--target", strconv.Itoa(p.PID), "--mount", "--root", filepath.Join(c.bin, "culvert"), "status", "-o", "json")
		var out, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		_ = cmd.Run() // it also exits with an error if the node is not ready
		var s api.Status
		if err := json.Unmarshal(out.Bytes(), &s); err != nil {
			return fmt.Errorf("%w: %s", err, errs.String())
		}
		return is(s)
	})
}

// TestD3D4AsTheUnitRunsIt checks that the daemon works with exactly what the unit grants it,
// and can write subnet.env at flannel's path (cases D3 and D4).
func TestD3D4AsTheUnitRunsIt(t *testing.T) {
	settings := unit(t)
	for _, k := range []string{"CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_BPF", "CAP_PERFMON"} {
		if !slices.Contains(settings["CapabilityBoundingSet"], k) {
			t.Errorf("the unit lacks %s", k)
		}
	}
	c := newCluster(t, 1)
	n := c.Nodes[0]
	for _, format := range []string{"vxlan", "ipip"} {
		c.setConfig(fmt.Sprintf(`{"Network":"10.5.0.0/16","Backend":{"Type":%q}}`, format))
		for _, datapath := range []string{"userspace", "kernel"} {
			if datapath == "kernel" && format == "ipip" {
				continue // the test machine's kernel may lack the device
			}
			t.Run(format+" "+datapath, func(t *testing.T) {
				flags := []string{"--datapath", datapath, "--queues", "2", "--metrics", ""}
				p := c.asUnit(n, settings, append(flags, "--subnet-file", "/run/flannel/subnet.env")...)
				c.unitStatus(p, n, func(s api.Status) error {
					if !s.Ready {
						return fmt.Errorf("not ready: %s", s.NotReady)
					}
					for _, m := range s.Datapath.Mechanisms {
						if !m.On && strings.Contains(m.Why, "permitted") {
							t.Errorf("%s is off: %s", m.Name, m.Why)
						}
					}
					if f := s.Datapath.FastPath; datapath == "kernel" && (f == nil || !f.On) {
						return fmt.Errorf("the fast path is off: %+v", f)
					}
					for _, w := range s.Datapath.Warnings {
						if strings.Contains(fmt.Sprint(w), "permitted") || strings.Contains(fmt.Sprint(w), "read-only") {
							t.Errorf("warned: %v", w)
						}
					}
					return nil
				})
				if err := exec.Command("nsenter", "--target", strconv.Itoa(p.PID), "--mount", "--root", "test", "-s", "/run/flannel/subnet.env").Run(); err != nil {
					t.Errorf("subnet.env: %v", err)
				}
				for line := range strings.Lines(p.Tail(200)) {
					if strings.Contains(line, "not permitted") || strings.Contains(line, "permission denied") || strings.Contains(line, "read-only") {
						t.Errorf("the log has: %s", line)
					}
				}
				if err := p.Stop(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestTheUnitsPriority checks that --priority works within what the unit grants: each
// thread has nice -10, and nothing of it without LimitNICE.
func TestTheUnitsPriority(t *testing.T) {
	if out, err := exec.Command("prlimit", "--nice="+strconv.Itoa(20-priority.Nice), "true").CombinedOutput(); err != nil {
		t.Skipf("needs CAP_SYS_RESOURCE, to set a limit as systemd does: %s", out)
	}
	c := newCluster(t, 1)
	n := c.Nodes[0]
	c.setConfig(config)
	for limit, want := range map[string]int{"": priority.Nice, "0": 0} {
		settings := maps.Clone(unit(t))
		if limit != "" {
			settings["LimitNICE"] = []string{limit}
		}
		p := c.asUnit(n, settings, "--datapath", "userspace", "--priority", "--metrics", "")
		c.unitStatus(p, n, func(s api.Status) error {
			if !s.Ready {
				return fmt.Errorf("not ready: %s", s.NotReady)
			}
			i := slices.IndexFunc(s.Datapath.Mechanisms, func(m api.Mechanism) bool { return m.Name == "priority" })
			if m := s.Datapath.Mechanisms[i]; m.On != (want != 0) || m.On != (m.Why == "nice -10") {
				t.Errorf("the status says %+v", m)
			}
			return nil
		})
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", p.PID))
		if err != nil || len(threads) < 3 {
			t.Fatalf("threads: %v (%v)", threads, err)
		}
		for _, thread := range threads {
			id, err := strconv.Atoi(filepath.Base(thread))
			if err != nil {
				t.Fatal(err)
			}
			if n, err := unix.Getpriority(unix.PRIO_PROCESS, id); err == nil && 20-n != want {
				t.Errorf("thread %d: nice %d, want %d", id, 20-n, want)
			}
		}
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
	}
}

// Without the capabilities that load programs the node works, and says what it
// does without.
func TestTheUnitWithoutBPF(t *testing.T) {
	c := newCluster(t, 1)
	n := c.Nodes[0]
	c.setConfig(config)
	for _, missing := range []string{"CAP_BPF", "CAP_PERFMON"} {
		settings := maps.Clone(unit(t))
		settings["CapabilityBoundingSet"] = slices.DeleteFunc(slices.Clone(settings["CapabilityBoundingSet"]), func(k string) bool { return k == missing })
		p := c.asUnit(n, settings, "--datapath", "kernel", "--metrics", "")
		c.unitStatus(p, n, func(s api.Status) error {
			if f := s.Datapath.FastPath; !s.Ready || f == nil || f.On || f.Mode != "auto" || !strings.Contains(f.Why, missing) {
				return fmt.Errorf("ready %t (%s), fast path %+v", s.Ready, s.NotReady, f)
			}
			return nil
		})
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
	}
}

// TestLoopWithoutBPF has two nodes whose loop may load no program: their pods' packets
// arrive as they were sent, in order, and the status says what is lost.
func TestLoopWithoutBPF(t *testing.T) {
	c := newClusterOf(t, lab.Options{Nodes: 2, InOrder: true})
	c.setConfig(config)
	for _, n := range c.Nodes {
		if _, err := n.Start(lab.Command{
			Name: n.ID, Path: "/usr/bin/setpriv",
			Args: []string{
				"--bounding-set", "-bpf,-sys_admin", filepath.Join(c.bin, "culvert"), "run", "--node-id", n.ID, "--run-dir", n.RunDir,
				"--etcd-endpoints", c.endpoint, "--datapath", "userspace",
			},
		}); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range c.Nodes {
		s := c.waitReady(n, 1)
		i := slices.IndexFunc(s.Datapath.Mechanisms, func(m api.Mechanism) bool { return m.Name == "sparse-queue" })
		if m := s.Datapath.Mechanisms[i]; m.On || !strings.Contains(m.Why, "CAP_BPF") || !strings.Contains(m.Why, "8 queues") {
			t.Errorf("the status says %+v", m)
		}
	}
	pods := c.pods()
	exchange(t, place{pods[0].Namespace, pods[0].Addrs}, place{pods[1].Namespace, pods[1].Addrs}, 8<<20)
}
