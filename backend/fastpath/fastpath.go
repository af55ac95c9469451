// Package fastpath puts tc programs (eBPF) before the kernel's vxlan devices:
// one encapsulates what leaves by the device and sends it to the uplink, one
// takes peers' packets out of their headers on the uplink and hands them to the
// device as received there. The host's routes, conntrack and nftables see what
// they always saw. What a program cannot or should not carry goes on to the
// device, packet by packet.
//
//	Snapshot ── Plan ── host.State ─┬─ host.Keeper: devices, routes, FDB, nftables
//	                                └─ Path.Follow: maps, then the tc filters
//
// Nothing is pinned. A tc filter holds its program, which holds its maps, and
// goes with its device: so the fast path stays while the daemon is away, and
// nothing is left to be stale. The next daemon loads programs of its own, fills
// their maps, and replaces the old ones, each in one step.
package fastpath

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/host"
)

// Mode is whether a fast path is asked for.
type Mode string

// The modes.
const (
	Auto Mode = "auto" // where the kernel and the host allow it
	On   Mode = "on"   // or the datapath is not opened
	Off  Mode = "off"
)

// The programs, by their names in the object. The filters bear them too.
const (
	programOut  = host.FilterName + "out"
	programIn   = host.FilterName + "in"
	programJoin = host.FilterName + "join"
)

var errNoTunnel = errors.New("there is no vxlan device")

// Path is the fast path of one datapath. It is a host.Follower.
type Path struct {
	mode Mode
	log  *slog.Logger

	// following is held while the kernel is looked at and changed, which may take
	// long where others hold its locks. Status does not wait for it.
	following sync.Mutex
	paths     pathMTUs
	ids       map[string]ebpf.ProgramID

	mu     sync.Mutex       // held for moments; after following, if both are
	loaded *ebpf.Collection // nil: it cannot be, and why says why; changed with both held
	held   contents         // of the maps
	on     bool
	why    string
}

// Open loads the programs, and tries them. With Auto a kernel that does not take
// them is no error: the Path stays off, and Status says why.
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

// load has the kernel check the programs, and tries them with packets.
func (p *Path) load() error {
	spec, err := loadSpec()
	if err != nil {
		return err
	}
	_ = rlimit.RemoveMemlock() // before Linux 5.11; where it may not, loading says so
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

// explain adds what helps to an error of loading.
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
		return fmt.Errorf("the kernel refuses the programs (Linux 5.10 takes them): %w", refused)
	}
	return fmt.Errorf("loading the programs: %w", err)
}

// has says whether this process has a capability, or CAP_SYS_ADMIN, which stood for
// those of eBPF before Linux 5.8.
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

// Want adds to a state what the fast path needs of the host: that its filters may
// stay, and the pair of veth that joins segments.
func (p *Path) Want(s *host.State) {
	p.mu.Lock()
	defer p.mu.Unlock()
	mtu := 0
	for _, l := range s.Links {
		if l.VXLAN != nil {
			mtu = max(mtu, l.MTU)
		}
	}
	if p.loaded == nil || mtu == 0 {
		return
	}
	s.FastPath = true
	s.Links = append(s.Links,
		host.Link{Name: host.JoinNear, MTU: mtu, Veth: host.JoinFar},
		host.Link{Name: host.JoinFar, MTU: mtu, Veth: host.JoinNear})
}

// Follow makes the maps equal to the state, then sees to it that the programs
// stand where they should. Where the host has something that the fast path would
// pass by, such as IPsec, the programs are taken away.
func (p *Path) Follow(s host.State, v host.View) ([]host.Change, error) {
	p.following.Lock()
	defer p.following.Unlock()
	if p.loaded == nil || !s.FastPath {
		return nil, nil
	}
	f, err := p.look(s)
	if v.Shut != "" {
		err = fmt.Errorf("the host's firewall keeps the tunnel's packets out, and the fast path would pass by it: %s", v.Shut)
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
	if err != nil { // the datapath below is whole without it
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
	p.on, p.why = on, why
}

// Status says whether the fast path is on, why not, and what it has carried.
func (p *Path) Status() api.FastPath {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := api.FastPath{Mode: string(p.mode), On: p.on, Why: p.why}
	r := p.read()
	s.Egress, s.Ingress, s.Joined, s.Slow = r.egress(), r.ingress(), r[inJoined], r.slow()
	return s
}

// Passed returns what has passed with each peer by the fast path since the last
// call.
func (p *Path) Passed() []host.Passed {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.loaded == nil || !p.on {
		return nil
	}
	sent := make(map[address]bool)
	for key := range p.held.peers {
		var is peer
		if err := p.loaded.Maps["peers"].Lookup(&key, &is); err == nil && is.Sent != 0 {
			sent[is.Outer] = true
			is.Sent = 0
			_ = p.loaded.Maps["peers"].Update(&key, &is, ebpf.UpdateExist)
		}
	}
	var all []host.Passed
	for _, s := range p.held.pairs {
		key, heard := keyOf(s), uint32(0)
		if err := p.loaded.Maps["sources"].Lookup(&key, &heard); err == nil && heard != 0 {
			zero := uint32(0)
			_ = p.loaded.Maps["sources"].Update(&key, &zero, ebpf.UpdateExist)
		}
		all = append(all, host.Passed{Source: s, Sent: sent[addressOf(s.Outer)], Received: heard != 0})
	}
	return all
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

// Close gives up this process's hold on the programs. Those that are attached
// stay: host.Apply with another state removes them.
func (p *Path) Close() {
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
