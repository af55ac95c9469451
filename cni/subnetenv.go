package cni

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"culvert/internal/boottime"
	"culvert/internal/statefile"
)

// SubnetEnv is the content of subnet.env, with which the daemon passes the lease to
// the CNI plugin. The format and the order of the lines are flannel's.
type SubnetEnv struct {
	// Networks are the cluster networks. Gateways are the first host addresses of
	// the leased subnets, with the subnet's length (10.5.72.1/24). Both have one entry
	// per family in use, IPv4 first; only flannel writes several networks of a family.
	Networks []netip.Prefix
	Gateways []netip.Prefix
	MTU      int  // of pods' interfaces
	IPMasq   bool // the daemon masquerades, so the delegate must not
	// Expires is when the lease expires unless the daemon renews it and rewrites the
	// file. It has a resolution of 1 s and is zero if not set, as in flannel's file.
	// The key is CULVERT_LEASE_EXPIRES, which other readers ignore.
	Expires time.Time
	// ExpiresUp is the same time by CLOCK_BOOTTIME of the boot Boot (random(4)),
	// since the wall clock may be set. Zero if not set. The key is
	// CULVERT_LEASE_EXPIRES_BOOTTIME.
	ExpiresUp time.Duration
	Boot      string
}

// The keys that are not flannel's. Values: RFC 3339 in UTC; seconds of
// CLOCK_BOOTTIME, "@" and the boot ID.
const (
	expiresKey   = "CULVERT_LEASE_EXPIRES"
	expiresUpKey = "CULVERT_LEASE_EXPIRES_BOOTTIME"
)

const (
	maxSubnetEnv = 64 << 10 // bytes; typically about 150
	minMTU       = 68       // RFC 791: the minimum for IPv4
	minMTU6      = 1280     // RFC 8200, section 5
	maxMTU       = 65535
)

// Subnets returns the leased subnets, which are the networks of the gateways.
func (e SubnetEnv) Subnets() []netip.Prefix {
	var out []netip.Prefix
	for _, g := range e.Gateways {
		out = append(out, g.Masked())
	}
	return out
}

// Marshal returns the text of the file, in the format of flannel's WriteSubnetFile
// (pkg/subnet/subnet.go).
func (e SubnetEnv) Marshal() []byte {
	var b strings.Builder
	for _, f := range []struct {
		is4             bool
		network, subnet string
	}{
		{true, "FLANNEL_NETWORK", "FLANNEL_SUBNET"},
		{false, "FLANNEL_IPV6_NETWORK", "FLANNEL_IPV6_SUBNET"},
	} {
		for _, l := range []struct {
			key  string
			from []netip.Prefix
		}{{f.network, e.Networks}, {f.subnet, e.Gateways}} {
			var values []string
			for _, p := range l.from {
				if p.Addr().Is4() == f.is4 {
					values = append(values, p.String())
				}
			}
			if len(values) > 0 {
				fmt.Fprintf(&b, "%s=%s\n", l.key, strings.Join(values, ","))
			}
		}
	}
	fmt.Fprintf(&b, "FLANNEL_MTU=%d\nFLANNEL_IPMASQ=%t\n", e.MTU, e.IPMasq)
	if !e.Expires.IsZero() {
		fmt.Fprintf(&b, "%s=%s\n", expiresKey, e.Expires.UTC().Format(time.RFC3339))
		if e.Boot != "" {
			fmt.Fprintf(&b, "%s=%d@%s\n", expiresUpKey, max(0, e.ExpiresUp/time.Second), e.Boot)
		}
	}
	return []byte(b.String())
}

// validate returns the first rule that e violates, in terms of the file's keys.
func (e SubnetEnv) validate() error {
	if len(e.Networks) == 0 {
		return errors.New("FLANNEL_NETWORK and FLANNEL_IPV6_NETWORK are missing")
	}
	uses6 := false
	for _, is4 := range []bool{true, false} {
		name := "FLANNEL_"
		if !is4 {
			name = "FLANNEL_IPV6_"
		}
		family := func(p netip.Prefix) bool { return p.Addr().Is4() == is4 }
		nets, gws := pick(e.Networks, family), pick(e.Gateways, family)
		switch {
		case len(nets) > 0 && len(gws) == 0:
			return fmt.Errorf("%sSUBNET is missing", name)
		case len(nets) == 0 && len(gws) > 0:
			return fmt.Errorf("%sNETWORK is missing", name)
		case len(gws) > 1:
			return fmt.Errorf("%sSUBNET has more than one subnet", name)
		}
		for _, gw := range gws {
			if !slices.ContainsFunc(nets, func(n netip.Prefix) bool {
				return n.Bits() <= gw.Bits() && n.Contains(gw.Addr())
			}) {
				return fmt.Errorf("%sSUBNET=%s is not inside %sNETWORK", name, gw, name)
			}
			uses6 = uses6 || !is4
		}
	}
	switch {
	case e.MTU < minMTU || e.MTU > maxMTU:
		return fmt.Errorf("FLANNEL_MTU=%d is not between %d and %d", e.MTU, minMTU, maxMTU)
	case uses6 && e.MTU < minMTU6:
		return fmt.Errorf("FLANNEL_MTU=%d is below %d, the minimum for IPv6", e.MTU, minMTU6)
	}
	return nil
}

func pick(from []netip.Prefix, want func(netip.Prefix) bool) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range from {
		if want(p) {
			out = append(out, p)
		}
	}
	return out
}

// ParseSubnetEnv parses a subnet.env written by flannel or culvert.
//
// It is strict, since adding pods to a wrong subnet does lasting damage: a line
// that is not an assignment, a repeated key, a subnet outside its network and a
// missing key are errors. Unknown keys are ignored.
func ParseSubnetEnv(text []byte) (SubnetEnv, error) {
	var e SubnetEnv
	if len(text) > maxSubnetEnv {
		return e, fmt.Errorf("a subnet.env of %d bytes is too long", len(text))
	}
	values := map[string]string{}
	for i, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			return e, fmt.Errorf("line %d: %.80q is not KEY=VALUE", i+1, line)
		}
		if _, twice := values[key]; twice {
			return e, fmt.Errorf("line %d: %s is set twice", i+1, key)
		}
		values[key] = value
	}

	for _, f := range []struct {
		key string
		is4 bool
		to  *[]netip.Prefix
	}{
		{"FLANNEL_NETWORK", true, &e.Networks},
		{"FLANNEL_IPV6_NETWORK", false, &e.Networks},
		{"FLANNEL_SUBNET", true, &e.Gateways},
		{"FLANNEL_IPV6_SUBNET", false, &e.Gateways},
	} {
		value, ok := values[f.key]
		if !ok {
			continue
		}
		for _, text := range strings.Split(value, ",") {
			p, err := netip.ParsePrefix(text)
			if err != nil {
				return SubnetEnv{}, fmt.Errorf("%s=%.80q: not an address with a prefix length", f.key, value)
			}
			if p.Addr().Is4() != f.is4 || p.Addr().Is4In6() {
				return SubnetEnv{}, fmt.Errorf("%s=%s: wrong address family", f.key, value)
			}
			if f.to == &e.Networks {
				p = p.Masked()
			}
			*f.to = append(*f.to, p)
		}
	}

	mtu, ok := values["FLANNEL_MTU"]
	if !ok {
		return SubnetEnv{}, errors.New("FLANNEL_MTU is missing")
	}
	var err error
	if e.MTU, err = strconv.Atoi(mtu); err != nil {
		return SubnetEnv{}, fmt.Errorf("FLANNEL_MTU=%.80q: not a number", mtu)
	}
	switch masq, ok := values["FLANNEL_IPMASQ"]; {
	case !ok:
		return SubnetEnv{}, errors.New("FLANNEL_IPMASQ is missing")
	case masq == "true" || masq == "false":
		e.IPMasq = masq == "true"
	default:
		return SubnetEnv{}, fmt.Errorf("FLANNEL_IPMASQ=%.80q: neither true nor false", masq)
	}
	if text, ok := values[expiresKey]; ok {
		if e.Expires, err = time.Parse(time.RFC3339, text); err != nil || e.Expires.IsZero() {
			return SubnetEnv{}, fmt.Errorf("%s=%.80q: not an RFC 3339 time", expiresKey, text)
		}
		if e.Expires = e.Expires.UTC(); e.Expires.Year() < 1 || e.Expires.Year() > 9999 {
			return SubnetEnv{}, fmt.Errorf("%s=%.80q: out of range", expiresKey, text)
		}
		e.Expires = e.Expires.Truncate(time.Second)
	}
	if text, ok := values[expiresUpKey]; ok && !e.Expires.IsZero() {
		up, boot, found := strings.Cut(text, "@")
		seconds, err := strconv.ParseInt(up, 10, 64)
		if err != nil || !found || boot == "" || strings.ContainsFunc(boot, unicode.IsSpace) || seconds < 0 || seconds > 1<<32 {
			return SubnetEnv{}, fmt.Errorf("%s=%.80q: not seconds@boot-id", expiresUpKey, text)
		}
		e.ExpiresUp, e.Boot = time.Duration(seconds)*time.Second, boot
	}
	if err := e.validate(); err != nil {
		return SubnetEnv{}, err
	}
	return e, nil
}

// Expired reports whether the lease has expired, so that another node may have the
// subnet and no pod may be added. In the boot in which the file was written,
// CLOCK_BOOTTIME decides; otherwise the wall clock. disputed reports that only the
// wall clock is past the expiry: it was set, or the machine was restored to an
// earlier snapshot.
func (e SubnetEnv) Expired(now boottime.Moment) (expired, disputed bool) {
	wall := !e.Expires.IsZero() && now.Wall.After(e.Expires)
	if e.Boot == "" || e.Boot != now.Boot {
		return wall, false
	}
	up := now.Up > e.ExpiresUp
	return up, wall && !up
}

// ReadSubnetEnv reads the file at path. If it does not exist, the error satisfies
// errors.Is(err, fs.ErrNotExist).
func ReadSubnetEnv(path string) (SubnetEnv, error) {
	text, err := statefile.Read(path, maxSubnetEnv)
	if errors.Is(err, fs.ErrNotExist) {
		return SubnetEnv{}, fmt.Errorf("%s does not exist: this node has no lease yet, see `culvert status`: %w", path, fs.ErrNotExist)
	}
	if err != nil {
		return SubnetEnv{}, fmt.Errorf("reading subnet.env: %w", err)
	}
	e, err := ParseSubnetEnv(text)
	if err != nil {
		return SubnetEnv{}, fmt.Errorf("%s: %w", path, err)
	}
	return e, nil
}

// WriteSubnetEnv atomically replaces the file at path by e; a reader sees the old or
// the new content, also after a crash. It creates the directory (mode 0755) if
// necessary.
func WriteSubnetEnv(path string, e SubnetEnv) error {
	if err := e.validate(); err != nil {
		return fmt.Errorf("refusing to write %s: %w", path, err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("writing subnet.env: %w", err)
	}
	if err := statefile.Write(path, e.Marshal(), 0o644); err != nil {
		return fmt.Errorf("writing subnet.env: %w", err)
	}
	return nil
}
