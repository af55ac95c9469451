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

// SubnetEnv is the content of subnet.env, the file through which a node
// daemon tells the CNI plugin what it leased. The format, and the order of
// its lines, are flannel's.
type SubnetEnv struct {
	// Networks are the cluster networks, and Gateways the first host address
	// of the leased subnet with the subnet's length (10.5.72.1/24); one entry
	// per family in use, IPv4 first. Only a file that flannel wrote can hold
	// more than one network of a family.
	Networks []netip.Prefix
	Gateways []netip.Prefix
	MTU      int  // of pods' interfaces
	IPMasq   bool // the daemon masquerades, so the delegate must not
	// Expires is when the lease ends unless the daemon, which renews it, writes
	// the file again; in whole seconds, zero if the file does not say (flannel's
	// does not). It is the key CULVERT_LEASE_EXPIRES, which other readers ignore.
	Expires time.Time
	// ExpiresUp is the same by CLOCK_BOOTTIME in the boot Boot (random(4)): the
	// wall clock may be set while the file stands. Zero if the file does not say.
	// It is the key CULVERT_LEASE_EXPIRES_BOOTTIME.
	ExpiresUp time.Duration
	Boot      string
}

// The lines of the file that are not flannel's: RFC 3339, UTC; and whole seconds
// of CLOCK_BOOTTIME, with the boot's id.
const (
	expiresKey   = "CULVERT_LEASE_EXPIRES"
	expiresUpKey = "CULVERT_LEASE_EXPIRES_BOOTTIME"
)

const (
	maxSubnetEnv = 64 << 10 // bytes; a real one has about 150
	minMTU       = 68       // RFC 791: what every IPv4 link must carry
	minMTU6      = 1280     // RFC 8200, section 5
	maxMTU       = 65535
)

// Subnets returns the leased subnets, the networks that the gateways stand in.
func (e SubnetEnv) Subnets() []netip.Prefix {
	var out []netip.Prefix
	for _, g := range e.Gateways {
		out = append(out, g.Masked())
	}
	return out
}

// Marshal returns the text of the file, as flannel's WriteSubnetFile writes it
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

// validate reports the first rule that e breaks, in the words of the file.
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
		return fmt.Errorf("FLANNEL_MTU=%d is below %d, the least that IPv6 allows", e.MTU, minMTU6)
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

// ParseSubnetEnv reads the text of a subnet.env, flannel's or ours.
//
// It is strict, since an ADD against a wrong subnet is damage that lasts: a
// line that is no assignment, a key given twice, a subnet outside its network
// and a missing key are errors. Keys that it does not know are ignored.
func ParseSubnetEnv(text []byte) (SubnetEnv, error) {
	var e SubnetEnv
	if len(text) > maxSubnetEnv {
		return e, fmt.Errorf("%d bytes is too long for a subnet.env", len(text))
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
			return e, fmt.Errorf("line %d: %s is given twice", i+1, key)
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
			return SubnetEnv{}, fmt.Errorf("%s=%.80q: not a time as RFC 3339 has it", expiresKey, text)
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

// Expired says whether the lease has run out: the subnet may be another
// node's now, and no pod may be added in it. In the boot in which the file was
// written CLOCK_BOOTTIME decides. disputed says that the wall clock is past the
// end and that one is not: it was set, or the machine was put back to an earlier
// state.
func (e SubnetEnv) Expired(now boottime.Moment) (expired, disputed bool) {
	wall := !e.Expires.IsZero() && now.Wall.After(e.Expires)
	if e.Boot == "" || e.Boot != now.Boot {
		return wall, false
	}
	up := now.Up > e.ExpiresUp
	return up, wall && !up
}

// ReadSubnetEnv reads the file at path. A file that is not there gives an
// error that satisfies errors.Is(err, fs.ErrNotExist).
func ReadSubnetEnv(path string) (SubnetEnv, error) {
	text, err := statefile.Read(path, maxSubnetEnv)
	if errors.Is(err, fs.ErrNotExist) {
		return SubnetEnv{}, fmt.Errorf("%s is not there: this node has no lease yet, see `culvert status`: %w", path, fs.ErrNotExist)
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

// WriteSubnetEnv makes the file at path hold e, and nothing in between: a
// reader sees the old content or the new, after a crash too. The directory is
// created (mode 0755) if it is not there.
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
