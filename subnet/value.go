package subnet

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// MaxValueLen is the largest size in bytes of a lease or configuration value;
// longer ones are rejected without being parsed. flannel's longest value is
// under 400 bytes.
const MaxValueLen = 64 << 10

// MaxNodeLen is the longest node identity in bytes, as for a DNS name.
const MaxNodeLen = 253

// MaxVNI is the largest VXLAN network identifier, 24 bits (RFC 7348).
const MaxVNI = 1<<24 - 1

// leaseValue is flannel's LeaseAttrs (pkg/lease/lease.go) followed by the
// owner's identity. The field order is the byte order in the store. flannel
// ignores unknown keys.
type leaseValue struct {
	PublicIP      string
	PublicIPv6    *string
	BackendType   string          `json:",omitempty"`
	BackendData   json.RawMessage `json:",omitempty"`
	BackendV6Data json.RawMessage `json:",omitempty"`
	NodeID        string          `json:",omitempty"`
}

// vxlanData is flannel's vxlanLeaseAttrs (pkg/backend/vxlan/vxlan.go).
type vxlanData struct {
	VNI     uint32
	VtepMAC string
}

// Key is the lease's key under <prefix>/subnets/, in flannel's form:
// 10.5.52.0-24, or 10.5.52.0-24&fd00:12:13::-64 for dual stack. An IPv6-only
// lease has only the second half; flannel does not read such keys.
func (l Lease) Key() string { return FormatKey(l.Subnets()) }

// Subnets returns the leased prefixes, IPv4 first.
func (l Lease) Subnets() []netip.Prefix {
	subnets := make([]netip.Prefix, len(l.Endpoints))
	for i, e := range l.Endpoints {
		subnets[i] = e.Subnet
	}
	return subnets
}

// Publics returns the underlay addresses that are set, IPv4 first.
func (l Lease) Publics() []netip.Addr {
	var publics []netip.Addr
	for _, e := range l.Endpoints {
		if e.Public.IsValid() {
			publics = append(publics, e.Public)
		}
	}
	return publics
}

// String describes the lease in messages: its subnets, owner and addresses.
func (l Lease) String() string {
	var b strings.Builder
	for i, s := range l.Subnets() {
		if i > 0 {
			b.WriteString(" and ")
		}
		b.WriteString(s.String())
	}
	b.WriteString(" (")
	if l.Node == "" {
		b.WriteString("no node identity")
	} else {
		fmt.Fprintf(&b, "node %q", l.Node)
	}
	for _, p := range l.Publics() {
		b.WriteString(", " + p.String())
	}
	b.WriteString(")")
	return b.String()
}

// FormatKey returns the key of a lease with these subnets, IPv4 first.
func FormatKey(subnets []netip.Prefix) string {
	var b strings.Builder
	for i, s := range subnets {
		if i > 0 {
			b.WriteByte('&')
		}
		b.WriteString(s.Addr().String())
		b.WriteByte('-')
		b.WriteString(strconv.Itoa(s.Bits()))
	}
	return b.String()
}

// ParseKey is the inverse of FormatKey. It rejects any other spelling of the
// same subnets, since two keys for one subnet would allow two owners.
func ParseKey(key string) ([]netip.Prefix, error) {
	if len(key) > 128 {
		return nil, fmt.Errorf("a key of %d bytes is too long for a subnet", len(key))
	}
	halves := strings.Split(key, "&")
	if len(halves) > 2 {
		return nil, fmt.Errorf("key %q has more than two subnets", key)
	}
	subnets := make([]netip.Prefix, 0, len(halves))
	for _, half := range halves {
		addr, bits, found := strings.Cut(half, "-")
		if !found {
			return nil, fmt.Errorf("key %q is not of the form 10.5.52.0-24", key)
		}
		p, err := netip.ParsePrefix(addr + "/" + bits)
		if err != nil {
			return nil, fmt.Errorf("key %q is not of the form 10.5.52.0-24", key)
		}
		switch {
		case p.Bits() == 0:
			return nil, fmt.Errorf("key %q claims the whole address space", key)
		case p != p.Masked():
			return nil, fmt.Errorf("key %q has host bits set; the subnet is %s", key, p.Masked())
		case p.Addr().Is4In6():
			return nil, fmt.Errorf("key %q holds an IPv4-mapped address", key)
		}
		subnets = append(subnets, p)
	}
	if len(subnets) == 2 && (!subnets[0].Addr().Is4() || subnets[1].Addr().Is4()) {
		return nil, fmt.Errorf("key %q is not an IPv4 subnet followed by an IPv6 one", key)
	}
	if FormatKey(subnets) != key {
		return nil, fmt.Errorf("key %q is another spelling of %q", key, FormatKey(subnets))
	}
	return subnets, nil
}

// Value returns the lease as flannel stores it, byte for byte, followed by the
// node's identity. A lease without a Backend is written as a reservation. Value
// fails if ParseLease would reject the result.
func (l Lease) Value() ([]byte, error) {
	v := leaseValue{PublicIP: "0.0.0.0", BackendType: l.Backend, NodeID: l.Node}
	if err := CheckNode(l.Node); l.Node != "" && err != nil {
		return nil, err
	}
	for _, e := range l.Endpoints {
		if !e.Subnet.IsValid() || e.Subnet != e.Subnet.Masked() {
			return nil, fmt.Errorf("lease %s: %s is not a subnet", l, e.Subnet)
		}
		var data json.RawMessage
		if l.Backend == "vxlan" {
			var err error
			if data, err = json.Marshal(vxlanData{e.VTEP.VNI, e.VTEP.MAC.String()}); err != nil {
				return nil, err
			}
		}
		if e.Subnet.Addr().Is4() {
			if e.Public.IsValid() {
				v.PublicIP = e.Public.String()
			}
			v.BackendData = data
		} else {
			if e.Public.IsValid() {
				text := e.Public.String()
				v.PublicIPv6 = &text
			}
			v.BackendV6Data = data
		}
	}
	value, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode lease %s: %w", l, err)
	}
	if _, err := ParseLease(l.Key(), value); err != nil {
		return nil, fmt.Errorf("lease %s is invalid: %w", l, err)
	}
	return value, nil
}

// ParseLease parses a lease from its key (without the store's prefix) and its
// value, written by flannel or culvert. It validates what a datapath depends on:
// the subnets, one address per subnet, and for vxlan a unicast MAC and a 24-bit
// VNI. It accepts unknown keys and backend types. A value without a backend type
// is a reservation and needs no address. Revisions and lifetime are left to the
// caller.
func ParseLease(key string, value []byte) (Lease, error) {
	subnets, err := ParseKey(key)
	if err != nil {
		return Lease{}, err
	}
	if len(value) > MaxValueLen {
		return Lease{}, fmt.Errorf("a value of %d bytes is over the limit of %d", len(value), MaxValueLen)
	}
	var v leaseValue
	if err := json.Unmarshal(value, &v); err != nil {
		return Lease{}, fmt.Errorf("the value is not a lease: %w", err)
	}
	if v.NodeID != "" {
		if err := CheckNode(v.NodeID); err != nil {
			return Lease{}, err
		}
	}
	if len(v.BackendType) > 64 {
		return Lease{}, fmt.Errorf("backend type %q is too long", clip(v.BackendType))
	}
	l := Lease{Node: v.NodeID, Backend: v.BackendType, Reserved: v.BackendType == ""}
	for _, s := range subnets {
		e := Endpoint{Subnet: s}
		text, data, name := v.PublicIP, v.BackendData, "PublicIP"
		if s.Addr().Is6() {
			text, data, name = "", v.BackendV6Data, "PublicIPv6"
			if v.PublicIPv6 != nil {
				text = *v.PublicIPv6
			}
		}
		if e.Public, err = parsePublic(text, s.Addr().Is4()); err != nil {
			return Lease{}, fmt.Errorf("%s: %w", name, err)
		}
		if !l.Reserved && !e.Public.IsValid() {
			return Lease{}, fmt.Errorf("%s is missing", name)
		}
		if l.Backend == "vxlan" {
			if e.VTEP, err = parseVTEP(data); err != nil {
				return Lease{}, err
			}
		}
		l.Endpoints = append(l.Endpoints, e)
	}
	return l, nil
}

// parsePublic returns the zero Addr if the address is not set: flannel writes
// 0.0.0.0 for a missing IPv4 address and null for a missing IPv6 address.
func parsePublic(text string, is4 bool) (netip.Addr, error) {
	if text == "" {
		return netip.Addr{}, nil
	}
	a, err := netip.ParseAddr(text)
	switch {
	case err != nil:
		return netip.Addr{}, fmt.Errorf("%q is not an IP address", clip(text))
	case a.Is4() != is4 || a.Is4In6() || a.Zone() != "":
		return netip.Addr{}, fmt.Errorf("%q is not a plain address of the subnet's family", clip(text))
	case a.IsUnspecified():
		return netip.Addr{}, nil
	case a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return netip.Addr{}, fmt.Errorf("%s is not a unicast address", a)
	}
	return a, nil
}

func parseVTEP(data json.RawMessage) (VTEP, error) {
	if len(data) == 0 {
		return VTEP{}, errors.New("a vxlan lease lacks VNI and VtepMAC")
	}
	var v vxlanData
	if err := json.Unmarshal(data, &v); err != nil {
		return VTEP{}, fmt.Errorf("parse the vxlan data: %w", err)
	}
	if v.VNI > MaxVNI {
		return VTEP{}, fmt.Errorf("VNI %d is over 24 bits", v.VNI)
	}
	mac, err := ParseMAC(v.VtepMAC)
	if err != nil {
		return VTEP{}, fmt.Errorf("VtepMAC: %w", err)
	}
	if !mac.IsUnicast() {
		return VTEP{}, fmt.Errorf("VtepMAC %s is not a unicast address", mac)
	}
	return VTEP{VNI: v.VNI, MAC: mac}, nil
}

// CheckNode validates a node identity: 1 to MaxNodeLen bytes of printable UTF-8
// without spaces.
func CheckNode(text string) error {
	switch {
	case text == "":
		return errors.New("the node identity is empty")
	case len(text) > MaxNodeLen:
		return fmt.Errorf("a node identity of %d bytes is over the limit of %d", len(text), MaxNodeLen)
	case !utf8.ValidString(text):
		return errors.New("the node identity is not UTF-8")
	}
	for _, r := range text {
		if unicode.IsSpace(r) || !unicode.IsPrint(r) {
			return fmt.Errorf("the node identity %q contains a space or a non-printable character", text)
		}
	}
	return nil
}
