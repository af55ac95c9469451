package bench

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"culvert/internal/lab"
)

// Datapath is one way of carrying packets between nodes.
type Datapath struct {
	Name  string
	Title string // shown on pages
	About string // shown in help
	// Program is the third-party program that implements the datapath; nil if it is
	// one of ours.
	Program *Program

	// generator overrides the run's generator; empty: the run's.
	generator string
	// none: there is no tunnel, and traffic goes to the underlay's addresses.
	none bool
	// kernel: the kernel forwards the packets, not a daemon.
	kernel bool
	// culvert: culvert's daemon runs it if the ends are pods.
	culvert bool
	// fast is the value of the daemon's --fast-path; empty: off.
	fast string
	// priority: the daemon raises its priority (--priority).
	priority bool
	// auto: the daemon chooses the datapath and the fast path.
	auto bool
}

// Suffixes of a datapath's name, for the daemon's --fast-path and --priority.
const (
	fastSuffix = "+fast" // as the daemon has it by default, or with the userspace datapath and IPIP, which have none by default, on
	onSuffix   = "+on"   // on, without the short way from pod to pod
	podSuffix  = "+pod"  // with the short way, whatever the host's rules

	prioritySuffix = "+priority"
)

// checkedNative is the datapath native with iperf3's traffic.
const checkedNative = "native/iperf3"

// Datapaths returns all datapaths in display order.
func Datapaths() []Datapath {
	all := []Datapath{
		{Name: "native", Title: "no tunnel", About: "the underlay without a tunnel: the upper bound", none: true},
		{Name: checkedNative, Title: "no tunnel, traffic by iperf3", About: "the same with iperf3's traffic, to check the built-in generator", none: true, generator: iperf3Name},
		{Name: "host-gw", Title: "plain routes (host-gw)", About: "routes over the underlay without a tunnel", kernel: true, culvert: true},
		{Name: "vxlan/auto", Title: "VXLAN, culvert's choice", About: "culvert's default: --datapath=auto, --fast-path=auto", culvert: true, auto: true},
		{Name: "vxlan/kernel", Title: "VXLAN, kernel", About: "the kernel's vxlan device, configured by culvert", kernel: true, culvert: true},
		{Name: "vxlan/kernel" + fastSuffix, Title: "VXLAN, kernel, fast path", About: "the same with culvert's fast path (--fast-path=auto)", kernel: true, culvert: true, fast: "auto"},
		{Name: "vxlan/kernel" + onSuffix, Title: "VXLAN, kernel, fast path by the host", About: "the same with --fast-path=on: all packets pass the host", kernel: true, culvert: true, fast: "on"},
		{Name: "vxlan/kernel" + podSuffix, Title: "VXLAN, kernel, pod to pod", About: "the same with --fast-path=pod", kernel: true, culvert: true, fast: "pod"},
		{Name: "vxlan/userspace", Title: "VXLAN, userspace", About: "culvert's userspace datapath", culvert: true},
		{Name: "vxlan/userspace" + fastSuffix, Title: "VXLAN, userspace, fast path", About: "the same with culvert's fast path (--fast-path=on)", culvert: true, fast: "on"},
		{Name: "vxlan/userspace" + prioritySuffix, Title: "VXLAN, userspace, nice -10", About: "culvert's userspace datapath at nice -10 (--priority)", culvert: true, priority: true},
		{Name: "ipip/kernel", Title: "IPIP, kernel", About: "the kernel's ipip device, configured by culvert", kernel: true, culvert: true},
		{Name: "ipip/kernel" + fastSuffix, Title: "IPIP, kernel, fast path", About: "the same with culvert's fast path (--fast-path=on)", kernel: true, culvert: true, fast: "on"},
		{Name: "ipip/userspace", Title: "IPIP, userspace", About: "culvert's userspace datapath", culvert: true},
		{Name: "ipip/userspace" + fastSuffix, Title: "IPIP, userspace, fast path", About: "the same with culvert's fast path (--fast-path=on)", culvert: true, fast: "on"},
		{Name: "naive", Title: "VXLAN, naive", About: "VXLAN with one packet per system call: the lower bound"},
		{Name: "wireguard-go", Title: "WireGuard, userspace", About: "the library wireguard-go, which encrypts"},
	}
	for _, p := range programs() {
		all = append(all, Datapath{Name: p.Name, Title: p.Title, About: p.About, Program: p})
	}
	return all
}

// Available reports whether the programs that the datapath needs are installed, and
// if not, which is missing.
func (d Datapath) Available() (ok bool, why string) {
	switch {
	case d.Program != nil:
		return d.Program.available()
	case d.generator == iperf3Name:
		return iperf3{}.available()
	}
	return true, ""
}

// instanceSep separates the name of a datapath from the number of its instance:
// "vxlan/kernel#2" is a second vxlan/kernel with separate nodes. The difference
// between two instances of one datapath is noise.
const instanceSep = "#"

// FindDatapath returns the datapath of a name, which may have an instance number, as
// in "vxlan/kernel#2".
func FindDatapath(name string) (Datapath, bool) {
	base, number, numbered := strings.Cut(name, instanceSep)
	if n, err := strconv.Atoi(number); numbered && (err != nil || n < 2) {
		return Datapath{}, false
	}
	for _, d := range Datapaths() {
		if d.Name == base {
			d.Name = name
			if numbered && d.Title != "" {
				d.Title += ", instance " + number
			}
			return d, true
		}
	}
	return Datapath{}, false
}

// base returns the datapath's name without the instance number.
func (d Datapath) base() string {
	base, _, _ := strings.Cut(d.Name, instanceSep)
	return base
}

func datapathNames() []string {
	var names []string
	for _, d := range Datapaths() {
		names = append(names, d.Name)
	}
	return names
}

// CompareDatapaths orders names as Datapaths does, and instances by number.
func CompareDatapaths(a, b string) int {
	aBase, aNumber, _ := strings.Cut(a, instanceSep)
	bBase, bNumber, _ := strings.Cut(b, instanceSep)
	names := datapathNames()
	return cmp.Or(
		cmp.Compare(slices.Index(names, aBase), slices.Index(names, bBase)),
		cmp.Compare(len(aNumber), len(bNumber)), cmp.Compare(aNumber, bNumber))
}

// Underlays returns the names of the underlays.
func Underlays() []string {
	var names []string
	for _, p := range lab.Profiles() {
		names = append(names, string(p))
	}
	return append(names, Existing)
}

const offloadProfile = lab.Offload

// Existing is the underlay between two real hosts.
const Existing = "existing"

// tunnelPort is the UDP port of the tunnels in a lab: the default of the kernel and
// of flannel. IANA's port for VXLAN is 4789.
const tunnelPort = 8472

// errEnded means that a daemon of a datapath has exited.
var errEnded = errors.New("ended")

// daemon is a process of a datapath.
type daemon struct {
	process process
	runDir  string // run directory from which to read its counters; empty if it has none
	idle    bool   // it handles no packets: do not count its cost
	fastDir string // run directory, if its fast path is on; else empty
}

// process is a started program: a labProcess or a *hostProcess.
type process interface {
	WaitLine(ctx context.Context, prefix string) (string, error)
	Tail(lines int) string
	Exited() <-chan struct{}
	Err() error
	Stop() error
	Pid() int
}

type labProcess struct{ *lab.Process }

func (p labProcess) Pid() int { return p.PID }

// alive returns an error if a daemon has exited.
func alive(daemons []daemon) error {
	for _, d := range daemons {
		select {
		case <-d.process.Exited():
			return fmt.Errorf("a daemon %w (%w): %s", errEnded, cause(d.process.Err()), lastLine(d.process))
		default:
		}
	}
	return nil
}

func cause(err error) error {
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}

func lastLine(p process) string { return p.Tail(1) }

// startLab creates a lab, starts the datapath and adds the ends.
func startLab(ctx context.Context, d Datapath, o siteOptions) (_ *site, err error) {
	l, err := lab.New(lab.Options{Nodes: o.nodes, Underlay: underlayOf(o.nodes), Bin: o.bin})
	if err != nil {
		return nil, err
	}
	s := &site{underlay: string(o.profile), datapath: d, close: l.Close}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	offloads, err := l.SetProfile(o.profile)
	if err != nil {
		return nil, err
	}
	s.offloads = offloads[0].Features
	if bridge := offloads[len(l.Nodes):]; len(bridge) > 0 {
		s.bridge = bridge[0].Features
	}
	s.labs = l
	s.to = l.Nodes[0].Addrs[0]
	for i, n := range l.Nodes {
		s.ends, s.subnets = append(s.ends, n.Namespace), append(s.subnets, innerSubnet(i))
	}
	switch {
	case d.none && o.ends == Pods:
		err = s.routeSubnets(l)
	case d.none:
	case d.Program != nil:
		err = s.startProgram(ctx, l, o)
	case d.fast != "" || d.auto || d.culvert && o.ends == Pods:
		err = s.startDaemons(ctx, l, o)
	default:
		err = s.startNodes(ctx, l, o)
	}
	if err == nil && o.ends == Pods {
		err = s.addPods(ctx, l)
	}
	s.far = localEnd(s.ends[0])
	for _, e := range s.ends[1:] {
		s.near = append(s.near, e)
	}
	if err == nil {
		err = s.reach(ctx)
	}
	if err == nil && d.Program != nil {
		err = sleep(ctx, time.Duration(d.Program.Settle))
	}
	return s, err
}

// underlayOf returns the underlay for a number of nodes: one veth pair for two.
func underlayOf(nodes int) lab.Underlay {
	if nodes == 2 {
		return lab.Direct
	}
	return lab.Bridged
}

// startNodes starts a process on each node that runs the node's part.
func (s *site) startNodes(ctx context.Context, l *lab.Lab, o siteOptions) error {
	part := Part{Datapath: s.datapath.base(), Port: tunnelPort, Absent: o.absent}
	for _, n := range l.Nodes {
		part.Underlay = append(part.Underlay, n.Addrs[0])
	}
	s.to = part.self().subnet.Addr()
	for i, n := range l.Nodes {
		part.Index, part.Link, part.RunDir = i, n.Link, n.RunDir
		args, err := nodeArgs(part)
		if err != nil {
			return err
		}
		p, err := n.Start(lab.Command{Name: n.ID, Path: o.self, Args: args})
		if err != nil {
			return err
		}
		s.add(labProcess{p}, n.RunDir)
	}
	return s.ready(ctx)
}
