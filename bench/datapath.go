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
	Title string // for a reader
	About string
	// Program is somebody else's, of which the datapath is made; nil else.
	Program *Program

	// generator makes its traffic, whichever the run's is; empty: the run's.
	generator string
	// none says that traffic goes by the underlay's own addresses.
	none bool
	// kernel says that no daemon carries packets.
	kernel bool
	// culvert says that culvert's daemon drives it, which then it does where the
	// ends are pods.
	culvert bool
	// fast says that the daemon has its fast path on; without it, off.
	fast bool
	// auto leaves it to the daemon what it takes, fast path included.
	auto bool
}

// fastSuffix ends the name of a datapath of culvert's with the fast path on.
const fastSuffix = "+fast"

// checkedNative is native with iperf3's traffic.
const checkedNative = "native/iperf3"

// Datapaths returns all of them, in the order in which they are shown.
func Datapaths() []Datapath {
	all := []Datapath{
		{Name: "native", Title: "no tunnel", About: "the underlay itself, no tunnel: the limit", none: true},
		{Name: checkedNative, Title: "no tunnel, traffic by iperf3", About: "the same with iperf3's traffic, to check the built-in generator", none: true, generator: iperf3Name},
		{Name: "host-gw", Title: "plain routes (host-gw)", About: "routes on the underlay, no tunnel", kernel: true, culvert: true},
		{Name: "vxlan/auto", Title: "VXLAN, culvert's choice", About: "what culvert takes by itself: --datapath=auto, --fast-path=auto", culvert: true, auto: true},
		{Name: "vxlan/kernel", Title: "VXLAN, kernel", About: "the Linux kernel's vxlan device, as culvert drives it", kernel: true, culvert: true},
		{Name: "vxlan/kernel" + fastSuffix, Title: "VXLAN, kernel, fast path", About: "the same below culvert's fast path", kernel: true, culvert: true, fast: true},
		{Name: "vxlan/userspace", Title: "VXLAN, userspace", About: "culvert's own loop", culvert: true},
		{Name: "vxlan/userspace" + fastSuffix, Title: "VXLAN, userspace, fast path", About: "the same below culvert's fast path", culvert: true, fast: true},
		{Name: "ipip/kernel", Title: "IPIP, kernel", About: "the Linux kernel's ipip device, as culvert drives it", kernel: true, culvert: true},
		{Name: "ipip/userspace", Title: "IPIP, userspace", About: "culvert's own loop", culvert: true},
		{Name: "naive", Title: "VXLAN, naive", About: "VXLAN with one packet per system call: the floor"},
		{Name: "wireguard-go", Title: "WireGuard, userspace", About: "the library, which encrypts"},
	}
	for _, p := range programs() {
		all = append(all, Datapath{Name: p.Name, Title: p.Title, About: p.About, Program: p})
	}
	return all
}

// Available says whether the datapath can be tried here, and if not, why.
func (d Datapath) Available() (ok bool, why string) {
	switch {
	case d.Program != nil:
		return d.Program.available()
	case d.generator == iperf3Name:
		return iperf3{}.available()
	}
	return true, ""
}

// again separates the name of a datapath from the number of its instance:
// "vxlan/kernel#2" is vxlan/kernel once more, with nodes of its own. Two
// instances of one datapath show what a difference means that there is not.
const again = "#"

// FindDatapath returns the datapath of a name, which may be one instance of
// several: "vxlan/kernel#2".
func FindDatapath(name string) (Datapath, bool) {
	base, number, numbered := strings.Cut(name, again)
	if n, err := strconv.Atoi(number); numbered && (err != nil || n < 2) {
		return Datapath{}, false
	}
	for _, d := range Datapaths() {
		if d.Name == base {
			d.Name = name
			return d, true
		}
	}
	return Datapath{}, false
}

// base is the datapath's name without the number of its instance.
func (d Datapath) base() string {
	base, _, _ := strings.Cut(d.Name, again)
	return base
}

func datapathNames() []string {
	var names []string
	for _, d := range Datapaths() {
		names = append(names, d.Name)
	}
	return names
}

// compareDatapaths orders names as Datapaths does, and instances of one by
// their numbers.
func compareDatapaths(a, b string) int {
	aBase, aNumber, _ := strings.Cut(a, again)
	bBase, bNumber, _ := strings.Cut(b, again)
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

// tunnelPort is the UDP port of the tunnels in a lab: IANA's is 4789, and 8472
// is the kernel's own and flannel's.
const tunnelPort = 8472

// errEnded says that a daemon of a datapath has ended.
var errEnded = errors.New("ended")

// daemon is a process that carries packets.
type daemon struct {
	process process
	runDir  string // of its counters; empty if it has none
	idle    bool   // it has done its part, and costs nothing
	fastDir string // of its counters, if it has a fast path that is on; empty else
}

// process is a started program: *lab.Process, or one on this host.
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

// alive returns an error if a daemon has ended.
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

// startLab makes the nodes of a lab, the datapath between them, and the ends.
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
	case d.fast || d.auto || d.culvert && o.ends == Pods:
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

// underlayOf is what joins so many nodes: one veth pair, where that is possible.
func underlayOf(nodes int) lab.Underlay {
	if nodes == 2 {
		return lab.Direct
	}
	return lab.Bridged
}

// startNodes starts one process per node that carries its part.
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
