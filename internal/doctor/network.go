package doctor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"culvert/internal/host"
	"culvert/internal/remedy"
)

// daemon reports a running daemon's warnings.
func daemon(_ context.Context, h Host) (string, []Finding) {
	if h.Status == nil {
		return "", []Finding{bad("start it: `systemctl start culvert`, or `culvert run`", "%s", noDaemon(h.NoDaemon))}
	}
	var all []Finding
	if !h.Status.Ready {
		all = append(all, bad("", "it is not ready: %s", h.Status.NotReady))
	}
	for _, w := range h.Status.Warnings {
		all = append(all, found(w))
	}
	for _, r := range h.Status.Rejected {
		all = append(all, risk("run `culvert lease check`", "the lease %s was rejected: %s", r.Key, r.Reason))
	}
	if len(h.Status.Datapath.StalePods) > 0 {
		all = append(all, risk("recreate them", "pods have another MTU than %d: %s", h.Status.Datapath.MTU, strings.Join(h.Status.Datapath.StalePods, ", ")))
	}
	if len(all) > 0 {
		return "", all
	}
	return fmt.Sprintf("ready, %s/%s, %d peers", h.Status.Datapath.WireFormat, h.Status.Datapath.Kind, len(h.Status.Peers)), nil
}

// noDaemon returns why no daemon answers, without the remedy, which the finding has.
func noDaemon(err error) string {
	if err == nil {
		return "no daemon answers"
	}
	what, _ := remedy.Split(err)
	return what
}

const (
	// dialTimeout is the timeout of connecting to one endpoint of the store.
	dialTimeout = 2 * time.Second
	// slow is a connect time to the store that renewals tolerate but that
	// indicates a problem.
	slow = 200 * time.Millisecond
)

// store connects to each endpoint of the store.
func store(ctx context.Context, h Host) (string, []Finding) {
	if len(h.Endpoints) == 0 {
		return "not checked: no daemon runs, and --etcd-endpoints is not set", nil
	}
	var all []Finding
	var seen []string
	for _, endpoint := range h.Endpoints {
		at := endpoint
		if u, err := url.Parse(endpoint); err == nil && u.Host != "" {
			at = u.Host
		}
		dialer := net.Dialer{Timeout: dialTimeout}
		began := time.Now()
		c, err := dialer.DialContext(ctx, "tcp", at)
		took := time.Since(began)
		if err != nil {
			all = append(all, bad("check the address, that the server runs, and this host's firewall and routes", "%s cannot be reached: %v", endpoint, err))
			continue
		}
		_ = c.Close()
		if took > slow {
			all = append(all, risk("", "%s takes %s to accept a connection", endpoint, took.Round(time.Millisecond)))
			continue
		}
		seen = append(seen, fmt.Sprintf("%s in %.1f ms", endpoint, float64(took)/float64(time.Millisecond)))
	}
	if h.Status != nil && !h.Status.Store.Connected && h.Status.Store.Error != "" {
		all = append(all, bad("", "the daemon cannot reach it: %s", h.Status.Store.Error))
	}
	return strings.Join(seen, ", "), all
}

// port checks whether something other than culvert uses the tunnel's UDP port.
func port(_ context.Context, h Host) (string, []Finding) {
	if h.Status != nil && h.Status.Datapath.WireFormat != "" && h.Status.Datapath.WireFormat != "vxlan" {
		return "not used by " + h.Status.Datapath.WireFormat, nil
	}
	var all []Finding
	conflicts, err := host.VXLANConflicts(1<<24, h.Port, true) // an impossible VNI: any device with the port
	if err != nil {
		return "", []Finding{bad("", "%v", err)}
	}
	for _, c := range conflicts {
		fix := fmt.Sprintf("ip link del %s, or give the network another port (`culvert config set`)", c.Device)
		if strings.HasPrefix(c.Device, "flannel") {
			fix = "stop flanneld, and start culvert with --take-over-flannel"
		}
		all = append(all, risk(fix, "%s %s, so the userspace datapath cannot use it", c.Device, c.Why))
	}
	holders, err := udpHolders(h.Port)
	if err != nil {
		return "", []Finding{risk("", "looking for the owner of UDP port %d: %v", h.Port, err)}
	}
	for _, who := range holders {
		if !strings.HasPrefix(who, "culvert ") {
			all = append(all, bad(fmt.Sprintf("stop it (`ss -lunp sport = :%d`), or give the network another port (`culvert config set`)", h.Port), "UDP port %d is taken by %s", h.Port, who))
		}
	}
	if len(all) > 0 {
		return "", all
	}
	return fmt.Sprintf("UDP %d is culvert's or free", h.Port), nil
}

// kernelHolds reports whether a vxlan device uses the port: the kernel's socket
// belongs to no process.
func kernelHolds(port uint16) bool {
	links, err := host.Retry(netlink.LinkList)
	return err == nil && slices.ContainsFunc(links, func(l netlink.Link) bool {
		v, ok := l.(*netlink.Vxlan)
		return ok && v.Port == int(port)
	})
}

// udpHolders returns the processes with a socket on the port in this network
// namespace, as "name (pid n)", without the sockets of the kernel's vxlan
// devices.
func udpHolders(port uint16) ([]string, error) {
	inodes := make(map[string]bool)
	for _, path := range []string{"/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"} {
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // no IPv6
		} else if err != nil {
			return nil, err
		}
		lines := bufio.NewScanner(f)
		for lines.Scan() {
			fields := strings.Fields(lines.Text())
			if len(fields) < 10 {
				continue
			}
			_, local, ok := strings.Cut(fields[1], ":")
			if n, err := strconv.ParseUint(local, 16, 16); ok && err == nil && uint16(n) == port && fields[9] != "0" {
				inodes["socket:["+fields[9]+"]"] = true
			}
		}
		_ = f.Close()
	}
	if len(inodes) == 0 {
		return nil, nil
	}
	var holders []string
	descriptors, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return nil, err
	}
	for _, fd := range descriptors {
		if target, err := os.Readlink(fd); err != nil || !inodes[target] {
			continue
		}
		pid := strings.Split(fd, "/")[2]
		name, _ := os.ReadFile("/proc/" + pid + "/comm")
		if who := fmt.Sprintf("%s (pid %s)", strings.TrimSpace(string(name)), pid); !slices.Contains(holders, who) {
			holders = append(holders, who)
		}
	}
	if len(holders) == 0 && !kernelHolds(port) {
		holders = append(holders, "a process in another PID namespace")
	}
	return holders, nil
}

// overlays lists name prefixes of other overlays' devices.
var overlays = []struct{ prefix, whose string }{
	{"flannel", "flannel"},
	{"vxlan.calico", "Calico"},
	{"cali", "Calico"},
	{"cilium_", "Cilium"},
	{"weave", "Weave Net"},
	{"kube-bridge", "kube-router"},
	{"antrea-gw", "Antrea"},
	{"ovn", "OVN"},
}

// leftovers reports devices of other overlays, which may route the same
// network.
func leftovers(_ context.Context, h Host) (string, []Finding) {
	links, err := host.Retry(netlink.LinkList)
	if err != nil {
		return "", []Finding{risk("", "listing the network interfaces: %v", err)}
	}
	found := make(map[string][]string)
	for _, l := range links {
		for _, o := range overlays {
			if strings.HasPrefix(l.Attrs().Name, o.prefix) {
				found[o.whose] = append(found[o.whose], l.Attrs().Name)
				break
			}
		}
	}
	var all []Finding
	for _, o := range overlays {
		devices, ok := found[o.whose]
		if !ok {
			continue
		}
		delete(found, o.whose)
		fix := "remove it, or reboot after it was uninstalled"
		if o.whose == "flannel" {
			fix = "stop flanneld, and start culvert with --take-over-flannel"
		}
		f := risk(fix, "devices of %s exist: %s", o.whose, strings.Join(devices, ", "))
		for _, name := range devices {
			f = f.doing(Action{Command: "ip link del " + name, Others: true, Do: func() error { return deleteLink(name) }})
		}
		all = append(all, f)
	}
	if len(all) > 0 {
		return "", all
	}
	return "none here", nil
}

func deleteLink(name string) error {
	l, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil // deleted with another, such as its veth peer
	}
	if err == nil {
		err = netlink.LinkDel(l)
	}
	return err
}

// managers checks whether systemd-networkd or NetworkManager runs and is
// configured to leave culvert's routes and devices alone.
func managers(_ context.Context, h Host) (string, []Finding) {
	var all []Finding
	var seen []string
	if h.exists("/run/systemd/netif/state") {
		const file = "/etc/systemd/networkd.conf.d/culvert.conf"
		for _, key := range []string{"ManageForeignRoutes", "ManageForeignRoutingPolicyRules"} {
			if !h.saysNo("networkd.conf", key) {
				all = append(all, risk("put "+key+"=no into the [Network] section of "+file+", and restart systemd-networkd",
					"systemd-networkd removes what it did not make itself when it restarts (%s)", key).
					doing(h.writing(file, "[Network]\nManageForeignRoutes=no\nManageForeignRoutingPolicyRules=no\n")))
			}
		}
		seen = append(seen, "systemd-networkd")
	}
	if h.exists("/run/NetworkManager") {
		text := h.configuration("/etc/NetworkManager/NetworkManager.conf", "/etc/NetworkManager/conf.d/*.conf", "/run/NetworkManager/conf.d/*.conf", "/usr/lib/NetworkManager/conf.d/*.conf")
		unmanaged := slices.ContainsFunc(strings.Split(text, "\n"), func(line string) bool {
			key, value, _ := strings.Cut(line, "=")
			return strings.TrimSpace(key) == "unmanaged-devices" && strings.Contains(value, "cvt") && strings.Contains(value, "culvert")
		})
		if !unmanaged {
			const file, devices = "/etc/NetworkManager/conf.d/culvert.conf", "unmanaged-devices=interface-name:cvt*;interface-name:culvert*;interface-name:cni*;interface-name:veth*"
			all = append(all, risk("put "+devices+" into the [keyfile] section of "+file,
				"NetworkManager may take culvert's devices over").doing(h.writing(file, "[keyfile]\n"+devices+"\n")))
		}
		seen = append(seen, "NetworkManager")
	}
	switch {
	case len(all) > 0:
		return "", all
	case len(seen) == 0:
		return "none runs", nil
	}
	return strings.Join(seen, " and ") + " leave culvert alone", nil
}

// writing returns the action that writes a configuration file, named after
// culvert, in another program's directory; that program reads it at its next
// restart.
func (h Host) writing(path, text string) Action {
	return Action{Command: fmt.Sprintf("printf %q > %s", text, path), Others: true, Do: func() error {
		if err := os.MkdirAll(filepath.Dir(h.path(path)), 0o755); err != nil {
			return err
		}
		return os.WriteFile(h.path(path), []byte(text), 0o644)
	}}
}

func (h Host) exists(path string) bool {
	_, err := os.Stat(h.path(path))
	return err == nil
}

// saysNo reports whether a systemd configuration file and its drop-ins disable
// a key; the last value wins.
func (h Host) saysNo(file, key string) bool {
	text := h.configuration("/usr/lib/systemd/"+file, "/etc/systemd/"+file,
		"/usr/lib/systemd/"+file+".d/*.conf", "/run/systemd/"+file+".d/*.conf", "/etc/systemd/"+file+".d/*.conf")
	no := false
	for line := range strings.Lines(text) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok && strings.TrimSpace(k) == key {
			no = slices.Contains([]string{"no", "false", "off", "0"}, strings.ToLower(strings.TrimSpace(v)))
		}
	}
	return no
}

// configuration concatenates files, in order.
func (h Host) configuration(patterns ...string) string {
	var text strings.Builder
	for _, p := range patterns {
		files, _ := filepath.Glob(h.path(p)) // a constant pattern: no error
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil {
				text.Write(b)
				text.WriteByte('\n')
			}
		}
	}
	return text.String()
}

func containers(_ context.Context, h Host) (string, []Finding) {
	all := slices.Clone(h.CNIProblems)
	if h.CNI != "" {
		all = append(all, bad("see `culvert cni status`", "no pod can be added: %s", h.CNI))
	}
	if len(all) > 0 {
		return "", all
	}
	return "pods can be added", nil
}

// state reports what a daemon would find if it were started now.
func state(_ context.Context, h Host) (string, []Finding) {
	if h.Status != nil {
		return "maintained by the daemon", nil
	}
	var all []Finding
	for _, problem := range h.Problems {
		f := found(problem.Warning)
		for _, c := range problem.Repairs {
			f.Repairs = append(f.Repairs, c.Command)
		}
		if problem.Do != nil {
			f = f.doing(Action{Command: problem.Fix, Others: true, Do: problem.Do})
		}
		all = append(all, f)
	}
	switch {
	case len(all) > 0:
		return "", all
	case !h.Foreseen:
		return "unknown: no daemon has left its state", nil
	}
	return "as the last daemon's copy of the leases requires", nil
}
