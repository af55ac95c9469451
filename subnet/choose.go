package subnet

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Occupancy is the state of the store when a node requests a lease.
type Occupancy struct {
	Leases []Lease // every valid lease and reservation
	// Unreadable are the subnets of malformed values. A node may be using them, so
	// they are never allocated.
	Unreadable []netip.Prefix
	// Quarantined are free subnets in quarantine (Search.Quarantined).
	Quarantined []netip.Prefix
	// Mine reports whether this node owns the lease by evidence other than its
	// value: the lease ID saved in the node's state file. May be nil.
	Mine func(Lease) bool
}

// Choice is what a node must write to obtain its lease.
type Choice struct {
	// Lease is the lease to write. If its Key is that of Keep, the write updates
	// Keep (and carries its revisions and ID); otherwise it creates the key.
	Lease Lease
	// Keep is the existing lease that the node keeps; nil if there is none.
	Keep *Lease
	// Drop are this node's other leases, to be deleted in the transaction that
	// writes the new one.
	Drop []Lease
}

// Check validates the claim.
func (c Claim) Check() error {
	if err := CheckNode(c.Node); err != nil {
		return err
	}
	if len(c.Config.Networks) == 0 {
		return errors.New("the claim has no network configuration")
	}
	if len(c.Ends) != len(c.Config.Networks) {
		return fmt.Errorf("the claim has %d addresses for %d address families", len(c.Ends), len(c.Config.Networks))
	}
	for i, e := range c.Ends {
		n := c.Config.Networks[i]
		if e.Public.Is4() != n.Prefix.Addr().Is4() {
			return fmt.Errorf("the public address %s is not of the address family of %s", e.Public, n.Prefix)
		}
		if err := checkPublic(e.Public, c.Config); err != nil {
			return err
		}
		if c.Config.Backend.Type == "vxlan" {
			if e.VTEP.VNI != c.Config.Backend.VNI {
				return fmt.Errorf("the claim's VNI is %d, the configuration's %d", e.VTEP.VNI, c.Config.Backend.VNI)
			}
			if !e.VTEP.MAC.IsUnicast() {
				return fmt.Errorf("the claim's MAC %s is not a unicast address", e.VTEP.MAC)
			}
		}
	}
	return nil
}

// Choose decides which lease a node gets; it is a pure function. In order of
// preference: the lease that the saved lease ID, the node identity or the public
// address identifies as its own, if the configuration still allocates that
// subnet; the subnet that it used last; a free one. It returns ErrConflict,
// naming both nodes, if another node holds the identity or the address, and
// ErrExhausted if no subnet is free.
//
// A lease without a node identity was written by flannel; the node that has its
// address takes it over. That is how a host migrates from flannel.
func Choose(c Claim, o Occupancy) (Choice, error) {
	if err := c.Check(); err != nil {
		return Choice{}, fmt.Errorf("claim of node %q: %w", c.Node, err)
	}
	var own []Lease
	var taken []netip.Prefix
	var conflict error
	var rival int64 // the lowest CreateRevision among the conflicting leases
	for _, l := range o.Leases {
		mine, err := c.owns(l, o.Mine)
		if mine {
			own = append(own, l)
			continue
		}
		taken = append(taken, l.Subnets()...)
		if err != nil && (conflict == nil || l.CreateRevision < rival) {
			conflict, rival = err, l.CreateRevision
		}
	}
	taken = slices.Concat(taken, o.Unreadable, c.Avoid)
	// A node can have several leases after a change of families or networks.
	// Prefer those with its identity, then the older ones.
	slices.SortStableFunc(own, func(a, b Lease) int {
		if named := b.Node == c.Node; named != (a.Node == c.Node) {
			if named {
				return 1
			}
			return -1
		}
		return int(min(max(a.CreateRevision-b.CreateRevision, -1), 1))
	})

	var keep *Lease
	for i := range own {
		if keep == nil && c.canKeep(own[i], o.Leases) {
			keep = &own[i]
		}
	}
	// A newer lease with our identity or address does not evict us.
	if conflict != nil && (keep == nil || rival < keep.CreateRevision) {
		return Choice{}, conflict
	}
	choice := Choice{Keep: keep, Lease: Lease{Node: c.Node, Backend: c.Config.Backend.Type}}
	for i := range own {
		if &own[i] != keep {
			choice.Drop = append(choice.Drop, own[i])
		}
	}
	if keep != nil {
		choice.Lease.CreateRevision, choice.Lease.ModRevision = keep.CreateRevision, keep.ModRevision
		choice.Lease.ID, choice.Lease.Expires = keep.ID, keep.Expires
		choice.Lease.Endpoints = c.endpoints(keep.Subnets())
		return choice, nil
	}

	var prefer []netip.Prefix
	for _, l := range own {
		prefer = append(prefer, l.Subnets()...)
	}
	for _, p := range c.Previous {
		// Skip a subnet that another node has used since: peers may still
		// have cached it as that node's.
		if !slices.ContainsFunc(o.Quarantined, p.Overlaps) {
			prefer = append(prefer, p)
		}
	}
	subnets := make([]netip.Prefix, len(c.Config.Networks))
	for i, n := range c.Config.Networks {
		var err error
		search := Search{Network: n, Prefer: prefer, Taken: taken, Quarantined: o.Quarantined, Seed: NodeSeed(c.Node)}
		if subnets[i], err = search.Next(); err != nil {
			return Choice{}, err
		}
	}
	choice.Lease.Endpoints = c.endpoints(subnets)
	return choice, nil
}

// owns reports whether the lease belongs to the claiming node. It returns
// ErrConflict if the lease has our identity or our address but does not provably
// belong to us.
func (c Claim) owns(l Lease, mine func(Lease) bool) (bool, error) {
	if l.Reserved {
		return false, nil
	}
	if mine != nil && mine(l) {
		return true, nil
	}
	named := l.Node == c.Node
	match, differ := c.compareAddresses(l)
	switch {
	case named && !differ && match:
		return true, nil
	case l.Node == "" && match:
		return true, nil
	case named:
		return false, fmt.Errorf("%w: the node at %s: the identity %q is already used by the holder of %s; give one of the two nodes another --node-id, or release the existing lease with 'culvert lease release %s'",
			ErrConflict, c.addresses(), c.Node, l, l.Subnets()[0])
	case match:
		return false, fmt.Errorf("%w: node %q: the address %s is already used by the holder of %s; give one of the two nodes another --public-ip, or release the existing lease with 'culvert lease release %s'",
			ErrConflict, c.Node, c.addresses(), l, l.Subnets()[0])
	}
	return false, nil
}

// compareAddresses reports whether the lease has one of our public addresses
// (match), and whether it has a different one in a family that we use (differ).
func (c Claim) compareAddresses(l Lease) (match, differ bool) {
	for _, e := range c.Ends {
		theirs, ok := l.Endpoint(e.Public.Is4())
		if !ok || !theirs.Public.IsValid() {
			continue
		}
		if theirs.Public == e.Public {
			match = true
		} else {
			differ = true
		}
	}
	return match, differ
}

func (c Claim) addresses() string {
	texts := make([]string, len(c.Ends))
	for i, e := range c.Ends {
		texts[i] = e.Public.String()
	}
	return strings.Join(texts, ", ")
}

// canKeep reports whether the node may keep its own lease: the configuration
// allocates these subnets, and no older lease overlaps them.
func (c Claim) canKeep(own Lease, all []Lease) bool {
	if len(own.Endpoints) != len(c.Config.Networks) {
		return false
	}
	for i, e := range own.Endpoints {
		if !c.Config.Networks[i].Fits(e.Subnet) {
			return false
		}
	}
	return !slices.ContainsFunc(all, func(l Lease) bool {
		return l.CreateRevision < own.CreateRevision && l.Overlaps(own)
	})
}

func (c Claim) endpoints(subnets []netip.Prefix) []Endpoint {
	ends := make([]Endpoint, len(subnets))
	for i, s := range subnets {
		ends[i] = Endpoint{Subnet: s, Public: c.Ends[i].Public}
		if c.Config.Backend.Type == "vxlan" {
			ends[i].VTEP = c.Ends[i].VTEP
		}
	}
	return ends
}

// Overlaps reports whether the two leases share an address.
func (l Lease) Overlaps(other Lease) bool {
	for _, a := range l.Endpoints {
		for _, b := range other.Endpoints {
			if a.Subnet.Overlaps(b.Subnet) {
				return true
			}
		}
	}
	return false
}

// Rival returns an error wrapping ErrConflict if the other lease, written
// concurrently, has the same node identity or a public address of l.
func (l Lease) Rival(other Lease) error {
	if other.Reserved || other.Key() == l.Key() {
		return nil
	}
	same := l.Node != "" && l.Node == other.Node
	for _, a := range l.Publics() {
		same = same || slices.Contains(other.Publics(), a)
	}
	if same {
		return fmt.Errorf("%w: %s and %s", ErrConflict, l, other)
	}
	return nil
}

// checkPublic rejects an underlay address that tunnel packets cannot be sent to:
// one that is not a host's, or one inside the cluster network, which would route
// into the tunnel.
func checkPublic(a netip.Addr, c Config) error {
	switch {
	case !a.IsValid() || a.IsUnspecified():
		return errors.New("no public address")
	case a.IsMulticast() || a.IsLoopback() || a.Is6() && a.IsLinkLocalUnicast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return fmt.Errorf("the public address %s is not a unicast host address", a)
	}
	for _, n := range c.Networks {
		if _, inside := n.AllocatableOverlap(netip.PrefixFrom(a, a.BitLen())); inside {
			return fmt.Errorf("the public address %s is inside the cluster network %s", a, n.Prefix)
		}
	}
	return nil
}
