// Package fastpath runs eBPF tc programs before the tunnel's device: the kernel's vxlan or
// ipip device, or the userspace datapath's TUN device. One
// encapsulates packets that leave by the device and sends them to the uplink. The other
// decapsulates peers' packets on the uplink and delivers them to the device as received
// there. Routes, conntrack and nftables see the same inner packets as before; packets
// that a program cannot carry go on to the device, one by one. The package owns the
// programs, their maps and filters; the devices are owned by internal/host, and the
// desired state comes from the datapath's Plan (package backend).
//
//	Snapshot ── Plan ── host.State ─┬─ host.Keeper: devices, routes, FDB, nftables
//	                                └─ Path.Follow: maps, then the tc filters
//
// Nothing is pinned: a tc filter holds its program, which holds its maps, and ends with
// its device. So the fast path works while no daemon runs, and leaves nothing behind. A
// restarted daemon loads new programs, fills their maps, and replaces each filter
// atomically.
package fastpath

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/firewall"
	"culvert/internal/host"
	"culvert/internal/names"
)

// Mode is the value of --fast-path.
type Mode string

// The modes.
const (
	// Auto: if the kernel and the host allow it, with the short way from pod to pod unless
	// a rule of the host counts on seeing each packet (host.View.EachPacket).
	Auto Mode = "auto"
	On   Mode = "on" // without the short way; opening the datapath fails if the programs do not load
	Off  Mode = "off"
	Pods Mode = "pod" // as Auto, with the short way whatever the host's rules
)

// shortens reports whether the mode allows the short way from pod to pod.
func (m Mode) shortens() bool { return m == Auto || m == Pods }

// The programs' names in the object, which are also their filters' names.
const (
	programOut  = names.FilterPrefix + "out"
	programIn   = names.FilterPrefix + "in"
	programJoin = names.FilterPrefix + "join"

	programPodOut = names.FilterPrefix + "pod_out"
	programPodIn  = names.FilterPrefix + "pod_in"
)

var errNoTunnel = errors.New("there is no tunnel device")

// Path is the fast path of one datapath. It is a host.Follower.
type Path struct {
	mode Mode
	log  *slog.Logger

	// following is held while Follow reads and changes the kernel's state, which may take
	// long if other programs hold its locks. Status does not wait for it.
	following sync.Mutex
	paths     pathMTUs
	ids       map[string]ebpf.ProgramID
	admitting *ringbuf.Reader // nil without the short way from pod to pod
	admitted  sync.WaitGroup
	podLinks  map[string]bool // pods' links that the programs are attached to; nil if unknown
	registry  host.Registry   // as of the last call of followPods
	// generation is that of the host's state in the programs' map of this name.
	generation uint32

	mu      sync.Mutex                             // held briefly; taken after following if both are
	loaded  *ebpf.Collection                       // nil if off or not loadable, see why; changed with both held
	held    contents                               // last written to the maps
	unsure  bool                                   // that was not written whole: the maps may hold what an earlier call wrote
	seen    map[firewall.Source]firewall.Exchanged // by the last call of Passed
	on      bool
	refused bool // loaded, but not to be used with the last state
	why     string
	// whyNotShort is why no pod has the short way, or empty.
	whyNotShort string
	short       int // pods' links that have it
}

// Open loads and tests the programs. If the kernel rejects them, Open returns an error
// with On; with Auto the Path stays off and Status says why.
func Open(mode Mode, log *slog.Logger) (*Path, error) {
	p := &Path{mode: mode, log: log, why: "waiting for the first leases"}
	if mode == Off {
		p.why = "turned off by flag"
		return p, nil
	}
	if err := p.load(); err != nil {
		if mode == On {
			return nil, fmt.Errorf("--fast-path=on: %w", err)
		}
		p.why = err.Error()
		log.Info("fast path off", "why", p.why)
	}
	return p, nil
}

// load loads the programs and tests them with packets.
func (p *Path) load() error {
	spec, err := loadSpec()
	if err != nil {
		return err
	}
	if !p.mode.shortens() { // they hold nothing
		spec.Maps["shortcuts"].MaxEntries = 1
		spec.Maps["tallies"].MaxEntries = 1
	}
	loaded, err := ebpf.NewCollection(spec)
	if err != nil {
		return explain(err)
	}
	ids := make(map[string]ebpf.ProgramID)
	for name, program := range loaded.Programs {
		info, err := program.Info()
		if err != nil {
			loaded.Close()
			return fmt.Errorf("asking for the program %s: %w", name, err)
		}
		id, ok := info.ID()
		if !ok {
			loaded.Close()
			return errors.New("the kernel does not name programs (Linux 4.13 does)")
		}
		ids[name] = id
	}
	if err := try(loaded); err != nil {
		loaded.Close()
		return err
	}
	if p.mode.shortens() {
		reader, err := ringbuf.NewReader(loaded.Maps["candidates"])
		if err != nil {
			loaded.Close()
			return fmt.Errorf("reading what the programs propose: %w", err)
		}
		shortcuts, err := loaded.Maps["shortcuts"].Clone() // Close may come first
		if err != nil {
			_ = reader.Close()
			loaded.Close()
			return err
		}
		p.admitting = reader
		p.admitted.Go(func() {
			defer shortcuts.Close()
			p.admit(reader, shortcuts)
		})
	}
	p.loaded, p.ids = loaded, ids
	return nil
}

func loadSpec() (*ebpf.CollectionSpec, error) {
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	if err != nil {
		return nil, fmt.Errorf("reading the programs: %w", err)
	}
	return spec, nil
}

// explain turns an error of loading into one that names the cause.
func explain(err error) error {
	var refused *ebpf.VerifierError
	switch {
	case errors.Is(err, unix.EPERM) && !has(unix.CAP_BPF):
		return errors.New("loading eBPF programs needs CAP_BPF")
	case errors.As(err, &refused) && !has(unix.CAP_PERFMON):
		return errors.New("loading eBPF programs of this kind needs CAP_PERFMON")
	case errors.Is(err, unix.ENOSYS):
		return errors.New("the kernel has no eBPF")
	case errors.As(err, &refused):
		return fmt.Errorf("the kernel refuses the programs (Linux 5.13 takes them): %w", refused)
	}
	return fmt.Errorf("loading the programs: %w", err)
}

// has reports whether this process has a capability, or CAP_SYS_ADMIN, which implies
// those for eBPF. It returns true if that is unknown.
func has(capability int) bool {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(b)) {
		if text, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(text), 16, 64)
			return err != nil || caps&(1<<capability|1<<unix.CAP_SYS_ADMIN) != 0
		}
	}
	return true
}

// Extend adds to a state what the fast path needs: permission for its filters, and the
// veth pair that runs GRO.
func (p *Path) Extend(s *host.State) {
	p.mu.Lock()
	defer p.mu.Unlock()
	mtu := 0
	for _, l := range s.Links {
		if l.VXLAN != nil || l.IPIP != nil || slices.ContainsFunc(s.Process, func(t host.ProcessTunnel) bool { return t.Link == l.Name }) {
			mtu = max(mtu, l.MTU)
		}
	}
	if p.loaded == nil || mtu == 0 {
		return
	}
	s.FastPath, s.ShortWay = true, p.mode.shortens()
	s.Links = append(s.Links,
		host.Link{Name: names.JoinNear, MTU: mtu, Veth: names.JoinFar},
		host.Link{Name: names.JoinFar, MTU: mtu, Veth: names.JoinNear})
}

// Follow updates the maps to the state, then attaches the programs. If that fails, or if
// the host has something that the fast path would bypass, such as IPsec, it detaches
// them.
func (p *Path) Follow(s host.State, v host.View) ([]host.Change, error) {
	p.following.Lock()
	defer p.following.Unlock()
	if p.loaded == nil || !s.FastPath {
		return nil, nil
	}
	f, err := p.look(s, v)
	if v.InputDrop != "" {
		err = fmt.Errorf("the host's firewall drops the tunnel's packets, and the fast path would bypass it: %s", v.InputDrop)
	}
	var want contents
	if err == nil {
		want, err = contentsOf(s, f)
	}
	if err != nil {
		changes, failed := p.stepBack()
		p.say(false, err.Error())
		return changes, failed
	}
	err = p.fill(want)
	var changes []host.Change
	if err == nil {
		changes, err = p.attach(want.hooks)
	}
	if err == nil && p.mode.shortens() {
		err = p.followPods(want)
	}
	if err != nil { // the kernel datapath works without it
		more, failed := p.stepBack()
		p.say(false, err.Error())
		return append(changes, more...), failed
	}
	p.say(true, "")
	return changes, nil
}

func (p *Path) say(on bool, why string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if on != p.on || why != p.why {
		if on {
			p.log.Info("fast path on")
		} else {
			p.log.Warn("fast path off", "why", why)
		}
	}
	p.on, p.why, p.refused = on, why, !on
}

// Status reports whether the fast path is on, why not, and what it has carried.
func (p *Path) Status() api.FastPath {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := api.FastPath{Mode: string(p.mode), On: p.on, Why: p.why}
	r := p.read()
	s.Egress, s.Ingress, s.Joined, s.Slow = r.egress(), r.ingress(), r[inJoined], r.slow()
	if p.mode.shortens() && p.on {
		s.Pods = &api.PodPath{Links: p.short, LeftOut: p.held.left, Egress: r[outShort], Ingress: r[inShort], Why: p.whyNotShort}
	}
	return s
}

func (p *Path) read() (r readings) {
	if p.loaded == nil {
		return r
	}
	m := p.loaded.Maps["counters"]
	var each []uint64
	for c := range counters {
		if err := m.Lookup(uint32(c), &each); err != nil {
			continue
		}
		for _, n := range each {
			r[c] += n
		}
	}
	return r
}

// Close releases this process's references to the programs. Attached ones stay attached;
// host.Apply with a state without the fast path removes them.
func (p *Path) Close() {
	if p.admitting != nil {
		_ = p.admitting.Close()
		p.admitted.Wait()
	}
	p.following.Lock()
	defer p.following.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.loaded != nil {
		p.loaded.Close()
		p.loaded, p.why = nil, "closed"
	}
	p.on = false
}
