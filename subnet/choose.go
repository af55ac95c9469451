package subnet

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Occupancy is what the store holds when a node asks for a lease.
type Occupancy struct {
	Leases []Lease // every lease and reservation that can be read
	// Unreadable are the subnets of values that cannot be read: somebody may
	// live there, so they are never given out.
	Unreadable []netip.Prefix
	// Resting are free subnets that others leased lately (Search.Resting).
	Resting []netip.Prefix
	// Mine reports whether this node holds the lease, for a reason that its
	// value does not show: its handle is in the node's state. Nil knows none.
	Mine func(Lease) bool
}

// Choice is what a node should write to have its lease.
type Choice struct {
	// Lease is the lease to write. Where its Key is Keep's, the write replaces
	// Keep (and carries its revisions and ID); else it creates the key.
	Lease Lease
	// Keep is the lease that the node has already and stays with, if any.
	Keep *Lease
	// Drop are this node's leases on subnets that it stays with no more, to be
	// deleted in the transaction that writes the new one.
	Drop []Lease
}

// Check says what a claim lacks.
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
			return fmt.Errorf("the public address %s is not of the family of %s", e.Public, n.Prefix)
		}
		if err := checkPublic(e.Public, c.Config); err != nil {
			return err
		}
		if c.Config.Backend.Type == "vxlan" {
			if e.VTEP.VNI != c.Config.Backend.VNI {
				return fmt.Errorf("the claim's VNI is %d, the configuration's %d", e.VTEP.VNI, c.Config.Backend.VNI)
			}
			if !e.VTEP.MAC.IsUnicast() {
				return fmt.Errorf("the claim's MAC %s is not one device's address", e.VTEP.MAC)
			}
		}
	}
	return nil
}

// Choose decides, purely, which lease a node should have: the one that its
// state, its identity or its public address says is its own, where the
// configuration still gives that subnet out; else the subnet that it used
// last; else a free one. ErrConflict names both sides where another node holds
// the identity or the address; ErrExhausted comes from the allocator.
//
// A lease without a node identity is flannel's, and is taken over by the node
// that has its address: that is how a host moves from flannel to culvert.
func Choose(c Claim, o Occupancy) (Choice, error) {
	if err := c.Check(); err != nil {
		return Choice{}, fmt.Errorf("claim of node %q: %w", c.Node, err)
	}
	var own []Lease
	var taken []netip.Prefix
	var conflict error
	var rival int64 // the oldest CreateRevision that conflicts
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
	// Two leases of one node are left by a change of families or networks: the
	// one that names the node counts first, then the older.
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
		if keep == nil && c.keeps(own[i], o.Leases) {
			keep = &own[i]
		}
	}
	// A newcomer with our identity or address does not evict us.
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
		// Ours once, and another's since: others may know it as that one's.
		if !slices.ContainsFunc(o.Resting, p.Overlaps) {
			prefer = append(prefer, p)
		}
	}
	subnets := make([]netip.Prefix, len(c.Config.Networks))
	for i, n := range c.Config.Networks {
		var err error
		search := Search{Network: n, Prefer: prefer, Taken: taken, Resting: o.Resting, Seed: NodeSeed(c.Node)}
		if subnets[i], err = search.Next(); err != nil {
			return Choice{}, err
		}
	}
	choice.Lease.Endpoints = c.endpoints(subnets)
	return choice, nil
}

// owns decides whose a lease is. Another node's identity or address on it is
// fine; one of the two being ours, without proof that the lease is, is not.
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
		return false, fmt.Errorf("%w: this node %s calls itself %q, and so does the holder of %s; give one of them another --node-id, or end the other's lease with 'culvert lease release %s'",
			ErrConflict, c.addresses(), c.Node, l, l.Subnets()[0])
	case match:
		return false, fmt.Errorf("%w: this node %q has the address %s, and so has the holder of %s; give one of them another --public-ip, or end the other's lease with 'culvert lease release %s'",
			ErrConflict, c.Node, c.addresses(), l, l.Subnets()[0])
	}
	return false, nil
}

// compareAddresses reports whether the lease has one of our public addresses,
// and whether it has another one in a family that we use.
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

// keeps reports whether the node may stay with a lease of its own: the
// configuration gives these subnets out, and no older lease overlaps them.
func (c Claim) keeps(own Lease, all []Lease) bool {
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

// Overlaps reports whether the two leases have an address in common.
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

// Rival returns an error that wraps ErrConflict if, of two leases written at
// one moment, the other has this one's node identity or an address of it.
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

// checkPublic refuses an underlay address that tunnel packets cannot be sent
// to: one that is nobody's, or that the tunnel itself would swallow.
func checkPublic(a netip.Addr, c Config) error {
	switch {
	case !a.IsValid() || a.IsUnspecified():
		return errors.New("no public address")
	case a.IsMulticast() || a.IsLoopback() || a.Is6() && a.IsLinkLocalUnicast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return fmt.Errorf("the public address %s is not one host's", a)
	}
	for _, n := range c.Networks {
		if _, inside := n.GivenOf(netip.PrefixFrom(a, a.BitLen())); inside {
			return fmt.Errorf("the public address %s lies in the cluster network %s", a, n.Prefix)
		}
	}
	return nil
}
