package bench

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"text/template"
	"time"

	"github.com/vishvananda/netlink"
	"sigs.k8s.io/yaml"

	"culvert/internal/host"
	"culvert/internal/lab"
)

// peerFiles are the descriptions of third-party programs, one file each.
//
//go:embed peers/*.yaml
var peerFiles embed.FS

// Program describes a datapath that a third-party program implements, and how to
// start it on two nodes. File names, file contents and commands are templates (see
// programNode). Commands run in a shell, in a directory of the node.
type Program struct {
	Name    string   `json:"-"`       // the file's name without .yaml
	Title   string   `json:"title"`   // shown on pages
	About   string   `json:"about"`   // shown in help
	Program string   `json:"program"` // searched on PATH
	Also    []string `json:"also"`    // other programs that must be on PATH
	Version string   `json:"version"` // command that prints the version in its first line
	// Files are written before Setup: contents by name.
	Files map[string]string `json:"files"`
	// Setup are commands to run before Start, each on both nodes before the next.
	Setup []string `json:"setup"`
	// Start is the daemon's command; it must stay in the foreground.
	Start string `json:"start"`
	// After are commands to run after Start, in the same order as Setup.
	After []string `json:"after"`
	// Device is the program's device. Unless the program Configures it, the harness
	// adds the node's inner address and a route to the other node's subnet, and sets
	// the MTU to the underlay's minus Cost.
	Device     string `json:"device"`
	Cost       int    `json:"cost"`
	Configures bool   `json:"configures"`
	// Address is a command that prints the inner address, if the program chooses it.
	Address string `json:"address"`
	// Settle is how long to wait after the first packet before measuring.
	Settle duration `json:"settle"`
	// Etcd is the network configuration to write to etcd; empty: no etcd is started.
	Etcd string `json:"etcd"`
}

// duration is a time.Duration that is written as text, such as 5s.
type duration time.Duration

// UnmarshalText parses the text as time.ParseDuration does.
func (d *duration) UnmarshalText(text []byte) error {
	t, err := time.ParseDuration(string(text))
	*d = duration(t)
	return err
}

// programNode is the data of a Program's templates.
type programNode struct {
	Self, Peer, First programEnd
	Link              string // name of the underlay's link
	Pods              bool   // the ends are pods
	Device            string
	Port              uint16
	Etcd              string // URL
}

type programEnd struct {
	Number   int // 1 or 2
	Underlay netip.Addr
	Inner    netip.Addr
	Subnet   netip.Prefix
	Dir      string
}

// programs returns the descriptions, sorted by name. They are embedded and tested, so
// that one that cannot be parsed is a bug.
var programs = sync.OnceValue(func() []*Program {
	files, err := peerFiles.ReadDir("peers")
	if err != nil {
		panic(fmt.Sprintf("the embedded descriptions of programs are missing: %v", err))
	}
	var all []*Program
	for _, f := range files {
		text, err := peerFiles.ReadFile("peers/" + f.Name())
		p := &Program{Name: strings.TrimSuffix(f.Name(), ".yaml")}
		if err == nil {
			err = yaml.UnmarshalStrict(text, p)
		}
		if err != nil {
			panic(fmt.Sprintf("peers/%s: %v", f.Name(), err))
		}
		all = append(all, p)
	}
	return all
})

func (p *Program) available() (bool, string) {
	for _, name := range append([]string{p.Program}, p.Also...) {
		if _, err := exec.LookPath(name); err != nil {
			return false, name + " is not on PATH"
		}
	}
	return true, ""
}

// version returns the first line that the program's version command prints.
func (p *Program) version() string {
	text, err := exec.Command("sh", "-c", p.Version).CombinedOutput() // some print it and exit with an error
	line, _, _ := strings.Cut(strings.TrimSpace(string(text)), "\n")
	if line == "" && err != nil {
		return "unknown"
	}
	return line
}

func expand(text string, n programNode) (string, error) {
	t, err := template.New("").Option("missingkey=error").Parse(text)
	if err != nil {
		return "", err
	}
	var b bytes.Buffer
	err = t.Execute(&b, n)
	return b.String(), err
}

// startProgram starts the program on both nodes. More than two are not supported.
func (s *site) startProgram(ctx context.Context, l *lab.Lab, o siteOptions) error {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	p := s.datapath.Program
	var ends [2]programEnd
	for i, n := range l.Nodes {
		subnet := innerSubnet(i)
		ends[i] = programEnd{Number: i + 1, Underlay: n.Addrs[0], Inner: subnet.Addr(), Subnet: subnet, Dir: filepath.Join(l.Dir, n.ID)}
	}
	etcd := ""
	if p.Etcd != "" {
		store, err := startEtcd(ctx, l, p.Etcd)
		if err != nil {
			return err
		}
		store.client.CloseIdleConnections()
		etcd = store.url
	}
	var nodes [2]programNode
	for i, n := range l.Nodes {
		nodes[i] = programNode{
			Self: ends[i], Peer: ends[1-i], First: ends[0],
			Link: n.Link, Pods: o.ends == Pods, Device: p.Device, Port: tunnelPort, Etcd: etcd,
		}
		if err := p.write(nodes[i]); err != nil {
			return err
		}
	}
	if err := p.both(ctx, l, nodes, p.Setup); err != nil {
		return err
	}
	for i, n := range l.Nodes {
		command, err := expand(p.Start, nodes[i])
		if err != nil {
			return err
		}
		process, err := n.Start(lab.Command{Name: n.ID, Path: "/bin/sh", Args: []string{"-c", "cd " + ends[i].Dir + " && " + command}})
		if err != nil {
			return err
		}
		s.add(labProcess{process}, "")
	}
	if err := s.checkStarted(ctx); err != nil {
		return err
	}
	if err := p.both(ctx, l, nodes, p.After); err != nil {
		return err
	}
	for i, n := range l.Nodes {
		if err := s.configureProgram(ctx, n, nodes[i]); err != nil {
			return err
		}
	}
	s.to = ends[0].Inner
	if p.Address == "" {
		return nil
	}
	for i, n := range l.Nodes {
		inner, err := p.address(ctx, n, nodes[i])
		if err != nil {
			return err
		}
		if i == 0 {
			s.to = inner
		}
		if s.subnets[i], err = inner.Prefix(s.subnets[i].Bits()); err != nil {
			return err
		}
	}
	return nil
}

// write writes the program's files to the node's directory.
func (p *Program) write(n programNode) error {
	for name, text := range p.Files {
		name, nerr := expand(name, n)
		text, terr := expand(text, n)
		if err := errors.Join(nerr, terr); err != nil {
			return err
		}
		path := filepath.Join(n.Self.Dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// both runs each command on both nodes before the next.
func (p *Program) both(ctx context.Context, l *lab.Lab, nodes [2]programNode, commands []string) error {
	for _, c := range commands {
		for i, n := range l.Nodes {
			if _, err := p.run(ctx, n, nodes[i], c); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *Program) run(ctx context.Context, n *lab.Node, in programNode, command string) (string, error) {
	command, err := expand(command, in)
	if err != nil {
		return "", err
	}
	out, err := n.Run(ctx, "/bin/sh", "-c", "cd "+in.Self.Dir+" && "+command)
	return strings.TrimSpace(string(out)), err
}

// address runs the program's Address command until it prints an address.
func (p *Program) address(ctx context.Context, n *lab.Node, in programNode) (netip.Addr, error) {
	for {
		text, err := p.run(ctx, n, in, p.Address)
		if a, perr := netip.ParseAddr(text); err == nil && perr == nil {
			return a, nil
		}
		if serr := sleep(ctx, 50*time.Millisecond); serr != nil {
			return netip.Addr{}, fmt.Errorf("%s has no inner address: its command printed %q", p.Name, text)
		}
	}
}

// checkStarted returns an error if a daemon exits within 200 ms of its start.
func (s *site) checkStarted(ctx context.Context) error {
	if err := sleep(ctx, 200*time.Millisecond); err != nil {
		return err
	}
	return alive(s.daemons)
}

// configureProgram waits for the program's device and configures it unless the
// program does.
func (s *site) configureProgram(ctx context.Context, n *lab.Node, in programNode) error {
	p := s.datapath.Program
	if p.Device == "" {
		return nil
	}
	for {
		err := n.Do(func() error {
			dev, err := netlink.LinkByName(p.Device)
			if err != nil || p.Configures {
				return err
			}
			return configureDevice(dev, n.Link, p.Cost, in.Self.Inner, in.Peer.Subnet)
		})
		if err == nil {
			return nil
		}
		if dead := alive(s.daemons); dead != nil {
			return dead
		}
		if serr := sleep(ctx, 50*time.Millisecond); serr != nil {
			return fmt.Errorf("device %s of %s: %w", p.Device, p.Name, err)
		}
	}
}

// configureDevice sets a device's MTU to the underlay's minus cost, adds its address
// and the routes to the other nodes' subnets, and sets it up.
func configureDevice(dev netlink.Link, underlay string, cost int, self netip.Addr, others ...netip.Prefix) error {
	under, err := netlink.LinkByName(underlay)
	if err != nil {
		return fmt.Errorf("underlay link %s: %w", underlay, err)
	}
	name := dev.Attrs().Name
	if err := netlink.LinkSetMTU(dev, under.Attrs().MTU-cost); err != nil {
		return fmt.Errorf("MTU of %s: %w", name, err)
	}
	if err := netlink.AddrReplace(dev, &netlink.Addr{IPNet: host.IPNet(netip.PrefixFrom(self, self.BitLen()))}); err != nil {
		return fmt.Errorf("address %s of %s: %w", self, name, err)
	}
	if err := netlink.LinkSetUp(dev); err != nil {
		return fmt.Errorf("setting %s up: %w", name, err)
	}
	for _, other := range others {
		if err := netlink.RouteReplace(&netlink.Route{
			LinkIndex: dev.Attrs().Index, Dst: host.IPNet(other), Src: self.AsSlice(),
			// On a device with neighbours the peer answers for its own address, not for
			// its pods'.
			Gw: other.Addr().AsSlice(), Flags: int(netlink.FLAG_ONLINK),
		}); err != nil {
			return fmt.Errorf("route %s via %s: %w", other, name, err)
		}
	}
	return nil
}

// versions returns the versions of the installed programs among the named datapaths.
func versions(datapaths []string) map[string]string {
	found := map[string]string{}
	for _, p := range programs() {
		if ok, _ := p.available(); ok && slices.Contains(datapaths, p.Name) {
			found[p.Name] = p.version()
		}
	}
	return found
}
