package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Underlay is how the nodes of a lab are connected.
type Underlay string

const (
	// Bridged connects any number of nodes by a bridge in the fabric namespace.
	Bridged Underlay = "bridge"
	// Direct connects two nodes by one veth pair without a bridge, for
	// measurements. A second, bridged link, ctl0, leads to the fabric.
	Direct Underlay = "direct"
)

// Options describe a lab. The zero value is one node on a bridge.
type Options struct {
	Nodes    int      // 1 if zero
	Underlay Underlay // Bridged if empty; Direct requires exactly two nodes
	// Prefixes are the underlay's networks, at most one of each family. Node k
	// gets the k-th address, the fabric the last but one. If empty:
	// 198.18.0.0/24 (RFC 2544, reserved for benchmarks).
	Prefixes []netip.Prefix
	MTU      int    // of the underlay's links in bytes; 1500 if zero
	Link     string // name of a node's underlay link; "eth0" if empty
	// Bin is the directory of culvert's programs, with the CNI plugins in its
	// subdirectory cni. If empty, FindBin is called when a pod is added.
	Bin string
	// Conflist returns a node's CNI network configuration list. If nil:
	// DefaultConflist.
	Conflist func(*Node) ([]byte, error)
	// Keep lets the processes outlive this one. The lab itself is only kept
	// after Lab.Keep.
	Keep bool
	// InOrder has each packet handled on a CPU that its flow determines, as a network card with
	// several queues does (RPS, Documentation/networking/scaling.rst; Linux 6.3). Otherwise a link
	// handles a packet on whichever CPU runs at the moment, so packets of one flow may overtake each
	// other when a sender or a poll of the link (NAPI) moves to another CPU.
	InOrder bool
}

var defaultPrefix = netip.MustParsePrefix("198.18.0.0/24")

// controlPrefix is the network of the links ctl0 in a direct underlay.
var controlPrefix = netip.MustParsePrefix("198.19.0.0/24")

// Lab is a set of nodes and the network between them.
type Lab struct {
	ID     string // the argument of `culvert demo --remove`
	Dir    string // Root/<ID>: logs, process records, the nodes' directories
	Fabric *Namespace
	// FabricAddrs are the fabric's addresses, reachable from every node: on
	// the underlay if it is bridged, else on the control links.
	FabricAddrs []netip.Addr
	Nodes       []*Node

	options   Options
	mu        sync.Mutex
	processes []*Process
	extra     []*Namespace // all but the fabric and the nodes, such as pods
	closed    bool
}

// Node is a machine of the lab: a network namespace and directories.
type Node struct {
	*Namespace
	ID    string       // "n1", "n2", ...
	Link  string       // the underlay link's name
	Addrs []netip.Addr // on the underlay, in the order of Options.Prefixes

	// RunDir is the daemon's --run-dir, in which the CNI plugin finds subnet.env.
	// StateDir holds the CNI plugins' state.
	RunDir, StateDir string
}

// SubnetFile returns the path of the node's subnet.env.
func (n *Node) SubnetFile() string { return filepath.Join(n.RunDir, "subnet.env") }

// New creates a lab: namespaces, links, addresses, and default routes via the
// fabric. The process must be root, if need be by EnterUserNamespace. On error
// nothing is left behind.
func New(o Options) (*Lab, error) {
	if o.Nodes == 0 {
		o.Nodes = 1
	}
	if o.Underlay == "" {
		o.Underlay = Bridged
	}
	if len(o.Prefixes) == 0 {
		o.Prefixes = []netip.Prefix{defaultPrefix}
	}
	if o.MTU == 0 {
		o.MTU = 1500
	}
	if o.Link == "" {
		o.Link = "eth0"
	}
	if o.Conflist == nil {
		o.Conflist = DefaultConflist
	}
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("creating a lab: %w", err)
	}
	id, err := register()
	if err != nil {
		return nil, fmt.Errorf("creating a lab: %w", err)
	}
	l := &Lab{ID: id, Dir: filepath.Join(Root, id), options: o}
	if err := l.build(); err != nil {
		return nil, errors.Join(fmt.Errorf("creating lab %s: %w", id, err), l.Close())
	}
	return l, nil
}

func (o Options) validate() error {
	switch {
	case o.Nodes < 1:
		return fmt.Errorf("%d nodes: at least one is needed", o.Nodes)
	case o.Underlay != Bridged && o.Underlay != Direct:
		return fmt.Errorf("underlay %q is neither %q nor %q", o.Underlay, Bridged, Direct)
	case o.Underlay == Direct && o.Nodes != 2:
		return fmt.Errorf("a direct underlay connects two nodes, not %d", o.Nodes)
	case len(o.Prefixes) > 2 || len(o.Prefixes) == 2 && o.Prefixes[0].Addr().Is4() == o.Prefixes[1].Addr().Is4():
		return fmt.Errorf("underlay networks %v: at most one of each address family", o.Prefixes)
	case len(o.Link) > 15:
		return fmt.Errorf("%q is too long for a link's name", o.Link)
	}
	for _, p := range o.Prefixes {
		// Three addresses are taken: network, broadcast and the fabric's.
		if host := p.Addr().BitLen() - p.Bits(); host < 31 && o.Nodes > 1<<host-3 {
			return fmt.Errorf("%d nodes do not fit in %s", o.Nodes, p)
		}
	}
	return nil
}

func (l *Lab) build() error {
	for _, d := range []string{"logs", "processes"} {
		if err := os.MkdirAll(filepath.Join(l.Dir, d), 0o755); err != nil {
			return err
		}
	}
	var err error
	if l.Fabric, err = newNamespace(l, l.ID+"-fabric"); err != nil {
		return err
	}
	for k := 1; k <= l.options.Nodes; k++ {
		id := fmt.Sprintf("n%d", k)
		n := &Node{
			ID: id, Link: l.options.Link,
			RunDir: filepath.Join(l.Dir, id, "run"), StateDir: filepath.Join(l.Dir, id, "cni"),
		}
		for _, d := range []string{n.RunDir, n.StateDir} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				return err
			}
		}
		if n.Namespace, err = newNamespace(l, l.ID+"-"+id); err != nil {
			return err
		}
		l.Nodes = append(l.Nodes, n)
	}
	return l.join()
}

// Close stops the nodes' processes, then the fabric's, and removes the namespaces
// and files. Closing twice is not an error. Do not close a lab after Keep.
func (l *Lab) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	processes := l.processes
	l.mu.Unlock()

	err := remove(l.ID)
	for _, p := range processes {
		<-p.exited
	}
	for _, n := range l.namespaces() {
		n.endKeeper()
	}
	return err
}

func (l *Lab) namespaces() []*Namespace {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := slices.Clone(l.extra)
	for _, n := range l.Nodes {
		all = append(all, n.Namespace)
	}
	if l.Fabric != nil {
		all = append(all, l.Fabric)
	}
	return all
}

// Processes returns all processes that were started, oldest first, including those
// that have exited.
func (l *Lab) Processes() []*Process {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]*Process(nil), l.processes...)
}

// Privileged reports whether this process may create named network namespaces and
// devices in them: it has CAP_SYS_ADMIN and CAP_NET_ADMIN, and may write to /run,
// which in another program's user namespace it may not.
func Privileged() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&header, &data[0]) != nil {
		return false
	}
	const want = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_NET_ADMIN
	return data[0].Effective&want == want && unix.Access("/run", unix.W_OK) == nil
}
