package subnet

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// Entry is one key under <prefix>/subnets/ as read from the store.
type Entry struct {
	Key   string // without the store's prefix, such as 10.5.52.0-24
	Value []byte
	// CreateRevision and ModRevision are the store's revisions.
	CreateRevision, ModRevision int64
	ID                          int64         // etcd lease ID; 0: never expires
	Expires                     time.Time     // zero if unknown
	Lifetime                    time.Duration // granted lifetime; zero if unknown

	lease Lease
	err   error
	read  bool
}

// NewEntry parses the value once, so that an entry is not parsed again for each
// snapshot. It keeps a reference to the value.
func NewEntry(e Entry) Entry {
	e.lease, e.err = e.parse()
	e.read = true
	return e
}

// BadEntry returns an entry that the store found not to be a valid lease.
func BadEntry(key string, reason error) Entry {
	return Entry{Key: key, err: reason, read: true}
}

// Lease returns the entry as a lease, or the reason why it is invalid. For an
// invalid one, ParseKey may still return the subnets.
func (e Entry) Lease() (Lease, error) {
	if e.read {
		return e.lease, e.err
	}
	return e.parse()
}

func (e Entry) parse() (Lease, error) {
	l, err := ParseLease(e.Key, e.Value)
	if err != nil {
		return Lease{}, err
	}
	l.CreateRevision, l.ModRevision = e.CreateRevision, e.ModRevision
	l.ID, l.Expires = e.ID, e.Expires
	return l, nil
}

// Occupied converts entries to the input of Choose.
func Occupied(entries []Entry) Occupancy {
	var o Occupancy
	for _, e := range entries {
		if l, err := e.Lease(); err == nil {
			o.Leases = append(o.Leases, l)
		} else if subnets, err := ParseKey(e.Key); err == nil {
			o.Unreadable = append(o.Unreadable, subnets...)
		}
	}
	return o
}

// BuildSnapshot builds the snapshot of the entries at one revision for the node that
// holds self; it is a pure function. An invalid entry is rejected with a reason and does
// not affect the others. Of two leases that conflict, the one with the lower
// CreateRevision wins, so that a new lease evicts no other; our own lease wins over all
// others.
func BuildSnapshot(cfg Config, self Lease, entries []Entry, revision int64) Snapshot {
	s := Snapshot{Revision: revision, Config: cfg, Self: self}
	s.Usage = cfg.Usage(entries)
	s.Peers = make([]Lease, 0, len(entries))
	ordered := make([]*Entry, len(entries))
	for i := range entries {
		ordered[i] = &entries[i]
	}
	slices.SortFunc(ordered, func(a, b *Entry) int {
		return cmp.Or(cmp.Compare(a.CreateRevision, b.CreateRevision), cmp.Compare(a.Key, b.Key))
	})

	seen := newAccepted(len(entries))
	selfKey := self.Key()
	isSelf := func(e *Entry) bool {
		l, err := e.Lease()
		return err == nil && selfKey != "" && e.Key == selfKey && l.Node == self.Node
	}
	if i := slices.IndexFunc(ordered, isSelf); i >= 0 {
		s.Self, _ = ordered[i].Lease()
		ordered = slices.Delete(ordered, i, i+1)
	}
	seen.add(selfKey, s.Self)
	for _, e := range ordered {
		l, err := e.Lease()
		reason := ""
		switch {
		case err != nil:
			reason = "malformed: " + err.Error()
		case l.Reserved:
			if key := seen.overlaps(l); key != "" {
				reason = "the reservation overlaps " + key + ", which is older or ours"
			}
		default:
			l, reason = checkPeer(cfg, l)
			if reason == "" {
				reason = seen.conflict(l)
			}
		}
		if reason != "" {
			s.Rejected = append(s.Rejected, Rejection{Key: e.Key, Reason: reason})
			continue
		}
		seen.add(e.Key, l)
		if !l.Reserved {
			s.Peers = append(s.Peers, l)
		}
	}
	slices.SortFunc(s.Peers, func(a, b Lease) int { return a.Endpoints[0].Subnet.Compare(b.Endpoints[0].Subnet) })
	slices.SortFunc(s.Rejected, func(a, b Rejection) int { return cmp.Compare(a.Key, b.Key) })
	return s
}

// checkPeer checks a lease against the configuration and removes the endpoint of a
// family that the network does not have. It returns the reason for a rejection.
func checkPeer(cfg Config, l Lease) (Lease, string) {
	if l.Backend != cfg.Backend.Type {
		return l, fmt.Sprintf("its backend is %q, the network uses %q", clip(l.Backend), cfg.Backend.Type)
	}
	ends, all := l.Endpoints[:0:0], true
	for _, e := range l.Endpoints {
		n, ok := cfg.Network(e.Subnet.Addr().Is4())
		if !ok {
			all = false
			continue
		}
		if !n.holds(e.Subnet) {
			return l, fmt.Sprintf("its subnet %s is outside %s", e.Subnet, n.Prefix)
		}
		if err := checkPublic(e.Public, cfg); err != nil {
			return l, err.Error()
		}
		if l.Backend == "vxlan" && e.VTEP.VNI != cfg.Backend.VNI {
			return l, fmt.Sprintf("its VNI is %d, the network uses %d", e.VTEP.VNI, cfg.Backend.VNI)
		}
		if len(l.Endpoints) > 1 {
			ends = append(ends, e)
		}
	}
	if all {
		return l, ""
	}
	if len(ends) == 0 {
		return l, "its address family is not enabled"
	}
	l.Endpoints = ends
	return l, ""
}

// accepted holds the subnets, addresses and MACs of the accepted leases, each
// with its key.
type accepted struct {
	subnets map[netip.Prefix]string
	lengths map[int]bool // BitLen<<8 | Bits of every subnet
	publics map[netip.Addr]string
	macs    map[MAC]string
}

func newAccepted(n int) *accepted {
	return &accepted{
		subnets: make(map[netip.Prefix]string, n), lengths: map[int]bool{},
		publics: make(map[netip.Addr]string, n), macs: make(map[MAC]string, n),
	}
}

func (r *accepted) add(key string, l Lease) {
	for _, e := range l.Endpoints {
		r.subnets[e.Subnet] = key
		r.lengths[e.Subnet.Addr().BitLen()<<8|e.Subnet.Bits()] = true
		if l.Reserved {
			continue
		}
		if e.Public.IsValid() {
			r.publics[e.Public] = key
		}
		if l.Backend == "vxlan" {
			r.macs[e.VTEP.MAC] = key
		}
	}
}

// conflict returns why the lease conflicts with an accepted one, or "".
func (r *accepted) conflict(l Lease) string {
	if key := r.overlaps(l); key != "" {
		return "overlaps " + key + ", which is older or ours"
	}
	for _, e := range l.Endpoints {
		if key, ok := r.publics[e.Public]; ok {
			return fmt.Sprintf("its public address %s belongs to %s, which is older or ours", e.Public, key)
		}
		if l.Backend != "vxlan" {
			continue
		}
		if key, ok := r.macs[e.VTEP.MAC]; ok {
			return fmt.Sprintf("its VtepMAC %s belongs to %s, which is older or ours", e.VTEP.MAC, key)
		}
	}
	return ""
}

// overlaps returns the key of an accepted lease that shares an address with l.
// Subnets nearly always have the same length, so one map look-up suffices.
func (r *accepted) overlaps(l Lease) string {
	for _, e := range l.Endpoints {
		addr, bits := e.Subnet.Addr(), e.Subnet.Bits()
		for packed := range r.lengths {
			if packed>>8 != addr.BitLen() {
				continue
			}
			if length := packed & 0xff; length <= bits {
				if key, ok := r.subnets[netip.PrefixFrom(addr, length).Masked()]; ok {
					return key
				}
				continue
			}
			for p, key := range r.subnets { // l contains longer prefixes: rare
				if e.Subnet.Overlaps(p) {
					return key
				}
			}
		}
	}
	return ""
}
