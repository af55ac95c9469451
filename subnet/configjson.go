package subnet

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// DefaultVXLANPort is the default of the Linux kernel and flannel; IANA's port
// is 4789.
const DefaultVXLANPort = 8472

// DefaultVNI is flannel's default.
const DefaultVNI = 1

// Backends are the wire formats that a configuration may name.
var Backends = []string{"vxlan", "ipip", "host-gw"}

// Warning reports a setting that is accepted but probably not intended.
type Warning struct {
	Key     string // the JSON key, such as "SubnetLne" or "Backend.Port"
	Message string // does not repeat the key
}

// String returns the key and the message on one line.
func (w Warning) String() string { return w.Key + ": " + w.Message }

// configValue is flannel's Config (pkg/subnet/config.go).
type configValue struct {
	EnableIPv4     *bool           `json:",omitempty"`
	EnableIPv6     bool            `json:",omitempty"`
	EnableNFTables bool            `json:",omitempty"`
	Network        string          `json:",omitempty"`
	IPv6Network    string          `json:",omitempty"`
	SubnetMin      string          `json:",omitempty"`
	SubnetMax      string          `json:",omitempty"`
	IPv6SubnetMin  string          `json:",omitempty"`
	IPv6SubnetMax  string          `json:",omitempty"`
	SubnetLen      int             `json:",omitempty"`
	IPv6SubnetLen  int             `json:",omitempty"`
	Backend        json.RawMessage `json:",omitempty"`
}

// backendValue holds the options that culvert supports of all of flannel's
// backends.
type backendValue struct {
	Type          string
	VNI           *int64 `json:",omitempty"`
	Port          int    `json:",omitempty"`
	MTU           int    `json:",omitempty"`
	GBP           bool   `json:",omitempty"`
	Learning      bool   `json:",omitempty"`
	DirectRouting bool   `json:",omitempty"`
}

var (
	configKeys = []string{
		"Network", "SubnetLen", "SubnetMin", "SubnetMax", "IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin",
		"IPv6SubnetMax", "EnableIPv4", "EnableIPv6", "EnableNFTables", "Backend",
	}
	backendKeys = map[string][]string{
		"vxlan":   {"Type", "VNI", "Port", "MTU", "GBP", "Learning", "DirectRouting"},
		"ipip":    {"Type", "MTU", "DirectRouting"},
		"host-gw": {"Type", "MTU"},
	}
)

// ParseConfig parses the network configuration in flannel's JSON and fills in
// flannel's defaults. An invalid setting is an error that names the violated
// rule; an unknown key is a warning that suggests the nearest known one.
func ParseConfig(text []byte) (Config, []Warning, error) {
	if len(text) > MaxValueLen {
		return Config{}, nil, fmt.Errorf("a network configuration of %d bytes is over the limit of %d", len(text), MaxValueLen)
	}
	var v configValue
	if err := unmarshalConfig("", text, &v); err != nil {
		return Config{}, nil, err
	}
	warnings := unknownKeys("", text, configKeys)
	cfg := Config{EnableNFTables: v.EnableNFTables}

	var backendWarnings []Warning
	var err error
	if cfg.Backend, backendWarnings, err = parseBackend(v.Backend); err != nil {
		return Config{}, nil, err
	}
	warnings = append(warnings, backendWarnings...)

	enable4 := v.EnableIPv4 == nil || *v.EnableIPv4
	switch {
	case !enable4 && !v.EnableIPv6:
		return Config{}, nil, errors.New("EnableIPv4 is false and EnableIPv6 is not set: the network has no address family")
	case !enable4 && v.Network != "":
		warnings = append(warnings, Warning{"Network", "has no effect while EnableIPv4 is false"})
	case !v.EnableIPv6 && v.IPv6Network != "":
		warnings = append(warnings, Warning{"IPv6Network", "has no effect without \"EnableIPv6\": true"})
	}
	if enable4 {
		n, hostBits, err := parseNetwork("", v.Network, v.SubnetLen, v.SubnetMin, v.SubnetMax, true)
		if err != nil {
			return Config{}, nil, err
		}
		warnings = append(warnings, hostBits...)
		cfg.Networks = append(cfg.Networks, n)
	}
	if v.EnableIPv6 {
		if cfg.Backend.Type == "ipip" {
			return Config{}, nil, errors.New("EnableIPv6: the ipip backend supports only IPv4; vxlan supports both")
		}
		n, hostBits, err := parseNetwork("IPv6", v.IPv6Network, v.IPv6SubnetLen, v.IPv6SubnetMin, v.IPv6SubnetMax, false)
		if err != nil {
			return Config{}, nil, err
		}
		warnings = append(warnings, hostBits...)
		cfg.Networks = append(cfg.Networks, n)
		if mtu := cfg.Backend.MTU; mtu != 0 && mtu < 1280 {
			return Config{}, nil, fmt.Errorf("Backend.MTU is %d; IPv6 requires at least 1280 (RFC 8200)", mtu)
		}
	}
	return cfg, warnings, nil
}

// unmarshalConfig decodes a JSON object and names the offending key in errors.
func unmarshalConfig(where string, text []byte, into any) error {
	err := json.Unmarshal(text, into)
	if typed, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		if typed.Field == "" {
			return fmt.Errorf("%sexpected a JSON object, not %s", where, typed.Value)
		}
		return fmt.Errorf("%s%s must be %s, not %s", where, typed.Field, kindName(typed.Type.String()), typed.Value)
	}
	if err != nil {
		return fmt.Errorf("the network configuration is not JSON: %w", err)
	}
	if bytes.Equal(bytes.TrimSpace(text), []byte("null")) {
		return fmt.Errorf("%sexpected a JSON object, not null", where)
	}
	return nil
}

func kindName(goType string) string {
	switch goType {
	case "bool":
		return "true or false"
	case "string":
		return "a string"
	default:
		return "a whole number"
	}
}

// unknownKeys ignores case, as encoding/json and therefore flannel do.
func unknownKeys(where string, text []byte, known []string) []Warning {
	var object map[string]json.RawMessage
	if json.Unmarshal(text, &object) != nil {
		return nil // the caller has reported it
	}
	var warnings []Warning
	for key := range object {
		if slices.ContainsFunc(known, func(k string) bool { return strings.EqualFold(k, key) }) {
			continue
		}
		message := "unknown key, ignored"
		if nearest := nearestKey(key, known); nearest != "" {
			message += fmt.Sprintf("; did you mean %q?", nearest)
		}
		warnings = append(warnings, Warning{where + clip(key), message})
	}
	slices.SortFunc(warnings, func(a, b Warning) int { return strings.Compare(a.Key, b.Key) })
	return warnings
}

func parseBackend(text json.RawMessage) (BackendConfig, []Warning, error) {
	if len(text) == 0 || string(text) == "null" {
		text = json.RawMessage(`{}`)
	}
	var v backendValue
	if err := unmarshalConfig("Backend: ", text, &v); err != nil {
		return BackendConfig{}, nil, err
	}
	var warnings []Warning
	if v.Type == "" {
		v.Type = "vxlan"
		warnings = append(warnings, Warning{"Backend.Type", "not set: culvert defaults to vxlan, flannel to udp"})
	}
	if lower := strings.ToLower(v.Type); lower != v.Type {
		if _, ok := backendKeys[lower]; ok { // flannel's backend.Manager ignores case
			warnings = append(warnings, Warning{"Backend.Type", fmt.Sprintf("%q is read as %q", v.Type, lower)})
			v.Type = lower
		}
	}
	known, ok := backendKeys[v.Type]
	if !ok {
		hint := ""
		if nearest := nearestKey(v.Type, Backends); nearest != "" {
			hint = fmt.Sprintf("; did you mean %q?", nearest)
		}
		return BackendConfig{}, nil, fmt.Errorf("Backend.Type is %q; culvert supports %s%s", clip(v.Type), strings.Join(Backends, ", "), hint)
	}
	for _, w := range unknownKeys("Backend.", text, known) {
		key := strings.TrimPrefix(w.Key, "Backend.")
		if slices.ContainsFunc(backendKeys["vxlan"], func(k string) bool { return strings.EqualFold(k, key) }) {
			w.Message = "has no effect with " + v.Type
		}
		warnings = append(warnings, w)
	}
	b := BackendConfig{Type: v.Type, MTU: v.MTU}
	if b.MTU != 0 && (b.MTU < 576 || b.MTU > 65535) {
		return BackendConfig{}, nil, fmt.Errorf("Backend.MTU is %d; it must be 0 (derived) or 576 to 65535", b.MTU)
	}
	if v.Type == "vxlan" {
		b.VNI, b.Port = DefaultVNI, DefaultVXLANPort
		b.GBP, b.Learning = v.GBP, v.Learning
		if v.VNI != nil {
			if *v.VNI < 0 || *v.VNI > MaxVNI {
				return BackendConfig{}, nil, fmt.Errorf("Backend.VNI is %d; it must be 0 to %d (24 bits)", *v.VNI, MaxVNI)
			}
			b.VNI = uint32(*v.VNI)
		}
		if v.Port != 0 {
			if v.Port < 0 || v.Port > 65535 {
				return BackendConfig{}, nil, fmt.Errorf("Backend.Port is %d; it must be 1 to 65535", v.Port)
			}
			b.Port = uint16(v.Port)
		}
	}
	if v.Type != "host-gw" {
		b.DirectRouting = v.DirectRouting
	}
	return b, warnings, nil
}

// parseNetwork applies flannel's rules (CheckNetworkConfig) to one family, whose
// keys start with family ("" or "IPv6").
func parseNetwork(family, network string, length int, first, last string, is4 bool) (Network, []Warning, error) {
	key := func(name string) string { return family + name }
	if network == "" {
		return Network{}, nil, fmt.Errorf("%s is missing", key("Network"))
	}
	p, err := netip.ParsePrefix(network)
	var warnings []Warning
	if err == nil && p != p.Masked() { // accepted by flannel (net.ParseCIDR)
		warnings = []Warning{{key("Network"), fmt.Sprintf("%s has host bits set; the network is %s", p, p.Masked())}}
		p = p.Masked()
	}
	switch {
	case err != nil:
		return Network{}, nil, fmt.Errorf("%s %q is not a network such as 10.5.0.0/16", key("Network"), clip(network))
	case p.Addr().Is4In6() || p.Addr().Is4() != is4:
		return Network{}, nil, fmt.Errorf("%s %s is of the wrong address family", key("Network"), p)
	case p.Bits() == 0:
		return Network{}, nil, fmt.Errorf("%s %s is the whole address space", key("Network"), p)
	case !usable(p):
		return Network{}, nil, fmt.Errorf("%s %s contains addresses that hosts cannot use (loopback, link-local or multicast)", key("Network"), p)
	}
	bits := p.Addr().BitLen()
	n := Network{Prefix: p, SubnetLen: length}
	usual, longest := 24, 30
	if !is4 {
		usual, longest = 64, 126
	}
	switch {
	case length == 0 && p.Bits() > bits-4:
		return Network{}, nil, fmt.Errorf("%s %s is too small: it must hold four subnets of four addresses, a /%d or shorter", key("Network"), p, bits-4)
	case length == 0 && p.Bits() <= usual-2:
		n.SubnetLen = usual
	case length == 0:
		n.SubnetLen = p.Bits() + 2
	case length < 0 || length > longest:
		return Network{}, nil, fmt.Errorf("%s is %d; it must be at most %d, since a subnet needs four addresses", key("SubnetLen"), length, longest)
	case length < p.Bits()+2:
		return Network{}, nil, fmt.Errorf("%s is %d; it must be at least %[4]d, since %[3]s must hold four subnets", key("SubnetLen"), length, p, p.Bits()+2)
	}

	size := u128pow2(bits - n.SubnetLen)
	n.SubnetMin = toU128(p.Addr()).add(size).addr(is4)
	n.SubnetMax = lastOf(p).add(u128{lo: 1}).sub(size).addr(is4)
	for _, bound := range []struct {
		name, text string
		into       *netip.Addr
	}{{key("SubnetMin"), first, &n.SubnetMin}, {key("SubnetMax"), last, &n.SubnetMax}} {
		if bound.text == "" {
			continue
		}
		a, err := netip.ParseAddr(bound.text)
		if err != nil {
			return Network{}, nil, fmt.Errorf("%s %q is not an IP address", bound.name, clip(bound.text))
		}
		if !p.Contains(a) {
			return Network{}, nil, fmt.Errorf("%s %s is outside %s", bound.name, a, p)
		}
		if aligned := netip.PrefixFrom(a, n.SubnetLen).Masked().Addr(); aligned != a {
			return Network{}, nil, fmt.Errorf("%s %s is not the first address of a /%d; that is %s", bound.name, a, n.SubnetLen, aligned)
		}
		*bound.into = a
	}
	if n.SubnetMax.Less(n.SubnetMin) {
		return Network{}, nil, fmt.Errorf("%s %s is above %s %s", key("SubnetMin"), n.SubnetMin, key("SubnetMax"), n.SubnetMax)
	}
	return n, warnings, nil
}

var unusable = []netip.Prefix{
	netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
}

func usable(p netip.Prefix) bool {
	return !slices.ContainsFunc(unusable, p.Overlaps)
}

// MarshalJSON writes flannel's keys with explicit subnet length and bounds, so
// that ParseConfig returns the same Config.
func (c Config) MarshalJSON() ([]byte, error) {
	v := configValue{EnableNFTables: c.EnableNFTables}
	has4 := false
	for _, n := range c.Networks {
		if n.Prefix.Addr().Is4() {
			has4 = true
			v.Network, v.SubnetLen = n.Prefix.String(), n.SubnetLen
			v.SubnetMin, v.SubnetMax = n.SubnetMin.String(), n.SubnetMax.String()
		} else {
			v.EnableIPv6 = true
			v.IPv6Network, v.IPv6SubnetLen = n.Prefix.String(), n.SubnetLen
			v.IPv6SubnetMin, v.IPv6SubnetMax = n.SubnetMin.String(), n.SubnetMax.String()
		}
	}
	if !has4 {
		v.EnableIPv4 = &has4
	}
	b := backendValue{
		Type: c.Backend.Type, Port: int(c.Backend.Port), MTU: c.Backend.MTU,
		GBP: c.Backend.GBP, Learning: c.Backend.Learning, DirectRouting: c.Backend.DirectRouting,
	}
	if b.Type == "vxlan" {
		vni := int64(c.Backend.VNI)
		b.VNI = &vni
	}
	var err error
	if v.Backend, err = json.Marshal(b); err != nil {
		return nil, err
	}
	return json.Marshal(v)
}

// UnmarshalJSON is ParseConfig without the warnings.
func (c *Config) UnmarshalJSON(text []byte) error {
	parsed, _, err := ParseConfig(text)
	if err != nil {
		return err
	}
	*c = parsed
	return nil
}

// Network returns the cluster network of one family, and whether it is enabled.
func (c Config) Network(is4 bool) (Network, bool) {
	for _, n := range c.Networks {
		if n.Prefix.Addr().Is4() == is4 {
			return n, true
		}
	}
	return Network{}, false
}

// CheckUnderlay returns an error if the allocatable part of the cluster network
// overlaps a prefix of the underlay: the tunnel would carry its own packets.
func (c Config) CheckUnderlay(prefixes []netip.Prefix) error {
	for _, n := range c.Networks {
		for _, p := range prefixes {
			if _, overlaps := n.AllocatableOverlap(p); overlaps {
				return fmt.Errorf("the cluster network %s overlaps %s, which the underlay uses: the tunnel would carry its own packets", n.Prefix, p.Masked())
			}
		}
	}
	return nil
}

// Admits reports whether a node can keep running with lease l under this
// configuration, as it can when the network grows. The error names what only a
// restart with a new lease can change.
func (c Config) Admits(l Lease) error {
	if l.Backend != c.Backend.Type {
		return fmt.Errorf("the backend would change from %s to %s", l.Backend, c.Backend.Type)
	}
	if len(l.Endpoints) != len(c.Networks) {
		return errors.New("the address families would change")
	}
	for _, e := range l.Endpoints {
		n, ok := c.Network(e.Subnet.Addr().Is4())
		switch {
		case !ok:
			return errors.New("the address families would change")
		case !n.holds(e.Subnet):
			return fmt.Errorf("our subnet %s would be outside %s", e.Subnet, n.Prefix)
		case l.Backend == "vxlan" && e.VTEP.VNI != c.Backend.VNI:
			return fmt.Errorf("the VNI would change from %d to %d", e.VTEP.VNI, c.Backend.VNI)
		}
	}
	return nil
}

// nearestKey returns the known word that was most likely meant, or "".
func nearestKey(word string, known []string) string {
	best, least := "", max(2, len(word)/3)+1
	if len(word) > 64 {
		return ""
	}
	for _, k := range known {
		if d := distance(strings.ToLower(word), strings.ToLower(k)); d < least {
			best, least = k, d
		}
	}
	return best
}

// distance is the Levenshtein distance in bytes.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			above := row[j+1]
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			row[j+1] = min(cost, above+1, row[j]+1)
			diagonal = above
		}
	}
	return row[len(b)]
}
