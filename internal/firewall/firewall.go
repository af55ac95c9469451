// Package firewall makes this host's packet filter equal to a Policy: culvert's
// nftables table, and accept rules in the iptables chains of other programs that
// would drop packets of pods or of the tunnel. It reads and evaluates other
// programs' rules (nftables, iptables-nft, iptables-legacy), also for one packet
// (Rules.Walk, TracePackets), but changes none of them. It does not decide what the
// Policy is, and does not repeat: package host calls it at each reconciliation.
//
//	           Policy, Devices
//	                 │
//	kernel ── Read ──┴── Diff ── steps ── Apply ── nftables transactions
//
// Diff, Obstacles and Problems do no I/O. The kernel holds the state.
package firewall

import (
	"errors"
	"fmt"
	"net/netip"
	"sort"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/names"
	"culvert/internal/remedy"
)

// Policy is what the packet filter must do for culvert. The zero value removes
// everything that is culvert's.
type Policy struct {
	Masquerade []Masquerade // one per address family, IPv4 first
	Tunnels    []TunnelRule // one per outer address family
	// Forward are the networks whose packets must pass other programs' FORWARD
	// chains.
	Forward []netip.Prefix
	// Count are the peers' subnets whose packets are counted, one by one.
	Count Counted
}

// Device is a link; the name or the index may be unknown.
type Device struct {
	Name  string
	Index int
}

// Devices are the links that packets of the cluster networks traverse. Other
// programs' rules are evaluated for packets that arrive and leave by them.
type Devices struct {
	Underlay Device
	Pods     Device // the one that pods are attached to
	Tunnels  map[netip.Prefix]Device
}

// Reading is the result of one read of the kernel's rules.
type Reading struct {
	table  *table // culvert's; nil if there is none
	others otherRules
}

// Read reads culvert's table and other programs' rules.
func Read() (Reading, error) {
	var r Reading
	c, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return r, refused("opening nftables", err)
	}
	defer func() { _ = c.CloseLasting() }()
	chains, err := c.ListChains()
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return r, nil // a kernel without nftables: writing returns the error
	}
	if err != nil {
		return r, refused("listing the nftables chains", err)
	}
	if r.table, err = readTable(c, chains); err != nil {
		return r, fmt.Errorf("reading the nftables table %s: %w", names.Table, err)
	}
	r.others, err = readOthers(c, chains, false)
	return r, err
}

// Applied returns what Read would return on a host on which the policy, and
// nothing else, is in force.
func (p Policy) Applied() Reading { return Reading{table: p.table()} }

// Step is one change. Diff computes it, Apply makes it.
type Step struct {
	Command string // the equivalent shell command
	// Foreign is set if the change is in another program's chain.
	Foreign bool

	do  func() error               // in a transaction of its own
	nft func(*nftables.Conn) error // in the transaction of all such steps
}

// Diff returns the steps from what was read to the policy: first new sets, which
// take a transaction each, then one transaction for our table and one for the
// accepts in other programs' chains.
func Diff(have Reading, want Policy, d Devices) []Step {
	others, _ := diffOthers(have.others, want, d)
	return append(diffTable(have.table, want.table()), others...)
}

// Obstacles returns warnings about other programs' rules that drop packets of pods
// or of the tunnel, and that the accepts do not prevent.
func Obstacles(have Reading, want Policy, d Devices) []api.Warning {
	_, warnings := diffOthers(have.others, want, d)
	return warnings
}

// Apply makes the changes and returns those that were made. It continues after an
// error, and returns all errors joined.
func Apply(steps []Step) (done []Step, err error) {
	var errs []error
	var own, foreign []Step
	for _, s := range steps {
		switch {
		case s.do != nil:
			if err := s.do(); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", s.Command, err))
				continue
			}
			done = append(done, s)
		case s.Foreign:
			foreign = append(foreign, s)
		default:
			own = append(own, s)
		}
	}
	for _, transaction := range [][]Step{own, foreign} {
		if err := commit(transaction); err != nil {
			errs = append(errs, err)
			continue
		}
		done = append(done, transaction...)
	}
	return done, errors.Join(errs...)
}

// commit makes the changes in one nftables transaction.
func commit(steps []Step) error {
	if len(steps) == 0 {
		return nil
	}
	c, err := nftables.New()
	if err != nil {
		return refused("opening nftables", err)
	}
	for _, s := range steps {
		if err := s.nft(c); err != nil {
			return fmt.Errorf("%s: %w", s.Command, err)
		}
	}
	if err := c.Flush(); err != nil {
		doing, err := firstRefused(steps), oneOf(err)
		if unsupported(err) {
			return remedy.Errorf("load nftables' modules (`modprobe -a nf_tables nft_ct nft_chain_nat nft_masq nft_fib_inet`), or use Linux 5.10 or later", "%s: the kernel refuses it: %w", doing, err)
		}
		return refused(doing, err)
	}
	return nil
}

// oneOf returns the first error of a transaction that was refused: the kernel answers each
// message that it cannot apply.
func oneOf(err error) error {
	var one *netlink.OpError
	if errors.As(err, &one) {
		return one
	}
	return err
}

// firstRefused returns the command of the first step that the kernel refuses, or the first
// command if it refuses only the whole. It changes nothing: each of its transactions ends with
// the deletion of a table that does not exist.
func firstRefused(steps []Step) string {
	i, found := sort.Find(len(steps), func(i int) int {
		c, err := nftables.New()
		if err != nil {
			return -1
		}
		for _, s := range steps[:i+1] {
			if s.nft(c) != nil {
				return -1
			}
		}
		c.DelTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: names.TableProbe})
		if answers(c.Flush()) > 1 {
			return 0
		}
		return 1
	})
	if !found {
		return fmt.Sprintf("nftables (%s, and %d more)", steps[0].Command, len(steps)-1)
	}
	return "nftables: " + steps[i].Command
}

// answers counts the messages of a transaction that the kernel refused.
func answers(err error) int {
	switch e := err.(type) {
	case nil:
		return 0
	case interface{ Unwrap() []error }:
		n := 0
		for _, one := range e.Unwrap() {
			n += answers(one)
		}
		return n
	case *netlink.OpError:
		return 1
	}
	return answers(errors.Unwrap(err))
}

// refused returns the error of a request to nftables, with the remedy where the kernel has
// none or this process may not use it.
func refused(doing string, err error) error {
	if unsupported(err) {
		return remedy.Errorf("load it (`modprobe nf_tables`), or use a kernel with CONFIG_NF_TABLES_INET", "%s: the kernel has no nftables: %w", doing, err)
	}
	for _, forbidden := range []error{unix.EPERM, unix.EACCES} {
		if errors.Is(err, forbidden) {
			return remedy.Errorf("run it as root, with CAP_NET_ADMIN in this network namespace, and without a seccomp or security policy that forbids netlink to netfilter", "%s: %w", doing, err)
		}
	}
	return fmt.Errorf("%s: %w", doing, err)
}

func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EAFNOSUPPORT)
}
