package cni

import (
	"encoding/json"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
)

func addressesOf(t *testing.T, texts ...string) (all []netlink.Addr) {
	t.Helper()
	for _, text := range texts {
		ip, n, err := net.ParseCIDR(text)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: n.Mask}})
	}
	return all
}

// TestConflicting states which addresses of a bridge keep the bridge plugin from assigning
// the gateway's, and which of them no pod can use as its gateway.
func TestConflicting(t *testing.T) {
	for name, test := range map[string]struct {
		gateway   string
		addresses []string
		all, free string
	}{
		"none":                          {"10.5.7.1/24", nil, "", ""},
		"the gateway's":                 {"10.5.7.1/24", []string{"10.5.7.1/24"}, "", ""},
		"another subnet's":              {"10.5.7.1/24", []string{"10.5.9.1/24"}, "10.5.9.1/24", ""},
		"behind the gateway's":          {"10.5.7.1/24", []string{"10.5.7.1/24", "10.5.9.1/24"}, "", ""},
		"before the gateway's":          {"10.5.7.1/24", []string{"10.5.9.1/24", "10.5.7.1/24"}, "10.5.9.1/24", ""},
		"IPv4 outside the cluster":      {"10.5.7.1/24", []string{"192.168.1.5/24"}, "192.168.1.5/24", ""},
		"link-local":                    {"10.5.7.1/24", []string{"169.254.3.4/16"}, "169.254.3.4/16", "169.254.3.4/16"},
		"another prefix length":         {"10.5.7.1/24", []string{"10.5.7.1/16"}, "10.5.7.1/16", "10.5.7.1/16"},
		"of the other family":           {"10.5.7.1/24", []string{"fd00:5::1/64"}, "", ""},
		"IPv6 outside the cluster":      {"fd00:5:0:7::1/64", []string{"2001:db8::1/64"}, "", ""},
		"IPv6 of another subnet":        {"fd00:5:0:7::1/64", []string{"fd00:5:0:8::1/64"}, "fd00:5:0:8::1/64", ""},
		"IPv6 that covers the gateway":  {"fd00:5:0:7::1/64", []string{"fd00::1/16"}, "fd00::1/16", ""},
		"IPv6 link-local":               {"fd00:5:0:7::1/64", []string{"fe80::1/64"}, "", ""},
		"IPv6 of another prefix length": {"fd00:5:0:7::1/64", []string{"fd00:5:0:7::1/80"}, "fd00:5:0:7::1/80", "fd00:5:0:7::1/80"},
	} {
		networks := []netip.Prefix{netip.MustParsePrefix("10.5.0.0/16"), netip.MustParsePrefix("fd00:5::/48")}
		all, free := conflicting(addressesOf(t, test.addresses...), netip.MustParsePrefix(test.gateway), networks)
		text := func(addresses []netlink.Addr) string {
			var s []string
			for _, a := range addresses {
				s = append(s, a.IPNet.String())
			}
			return strings.Join(s, " ")
		}
		if text(all) != test.all || text(free) != test.free {
			t.Errorf("%s: %q, of which free %q", name, text(all), text(free))
		}
	}
}

// TestUnusableBridgeRemedies states what is said of a bridge, and whether the next ADD repairs it.
func TestUnusableBridgeRemedies(t *testing.T) {
	gateway := netip.MustParsePrefix("10.5.7.1/24")
	old := addressesOf(t, "10.5.9.1/24")
	for name, test := range map[string]struct {
		bridge     unusableBridge
		repairable bool
		says, fix  string
	}{
		"without pods":  {unusableBridge{address: old, gateway: gateway}, true, "has the address 10.5.9.1/24", "ip address del 10.5.9.1/24 dev cni0 (the next ADD"},
		"with pods":     {unusableBridge{address: old, gateway: gateway, ports: 2}, false, "2 interfaces are on it", "drain the node"},
		"free, pods":    {unusableBridge{address: old, removable: old, gateway: gateway, ports: 2}, true, "has the address", "ip address del"},
		"IPv6 disabled": {unusableBridge{noIPv6: true}, true, "has IPv6 disabled", "sysctl -w net.ipv6.conf.cni0.disable_ipv6=0 (the next ADD"},
		"no MAC":        {unusableBridge{noMAC: true}, true, "has no Ethernet address", "ip link set cni0 address"},
		"not a bridge":  {unusableBridge{foreign: "is a veth device, not a bridge"}, false, "cni0 is a veth device, not a bridge", "rename or delete it"},
	} {
		b := test.bridge
		b.name = "cni0"
		if b.repairable() != test.repairable || !strings.Contains(b.describe(), test.says) || !strings.Contains(b.fix(), test.fix) {
			t.Errorf("%s: repairable %t, %q, fix %q", name, b.repairable(), b.describe(), b.fix())
		}
	}
}

// TestBridgeName states for which delegates the plugin looks after a bridge.
func TestBridgeName(t *testing.T) {
	for conf, want := range map[string]string{
		`{}`:                                      "cni0",
		`{"delegate":{"bridge":"br7"}}`:           "br7",
		`{"delegate":{"type":"macvlan"}}`:         "",
		`{"ipam":{"type":"dhcp"}}`:                "",
		`{"delegate":{"isGateway":false}}`:        "",
		`{"delegate":{"forceAddress":true}}`:      "",
		`{"delegate":{"isDefaultGateway":true}}`:  "cni0",
		`{"delegate":{"bridge":7}}`:               "error",
		`{"delegate":{"isGateway":"yes"}}`:        "error",
		`{"delegate":{"bridge":"x","mtu":"any"}}`: "x",
	} {
		var n NetConf
		if err := json.Unmarshal([]byte(conf), &n); err != nil {
			t.Fatal(err)
		}
		got, err := n.bridgeName()
		if err != nil {
			got = "error"
		}
		if got != want {
			t.Errorf("%s: %q, %v", conf, got, err)
		}
	}
}

// TestValidity states what a runtime's list of valid attachments keeps.
func TestValidity(t *testing.T) {
	eth0, eth1, whole := Attachment{ContainerID: "c", IfName: "eth0"}, Attachment{ContainerID: "c", IfName: "eth1"}, Attachment{ContainerID: "c"}
	other := Attachment{ContainerID: "d", IfName: "eth0"}
	for conf, keeps := range map[string][]Attachment{
		`{}`:                                 {eth0, eth1, whole, other},
		`{"cni.dev/valid-attachments":null}`: {eth0, eth1, whole, other},
		`{"cni.dev/valid-attachments":[]}`:   {eth0, eth1, whole, other},
		`{"cni.dev/valid-attachments":[],"gcEmptyMeansAll":true}`:                                                 {},
		`{"cni.dev/valid-attachments":[{"containerID":"c","ifname":"eth0"}]}`:                                     {eth0, whole},
		`{"cni.dev/valid-attachments":[{"containerID":"c"}]}`:                                                     {eth0, eth1, whole},
		`{"cni.dev/attachments":[{"containerID":"d","ifname":"eth0"}]}`:                                           {other},
		`{"cni.dev/valid-attachments":[{"containerID":"d","ifname":"eth0"},{"containerID":"c","ifname":"eth1"}]}`: {eth1, whole, other},
	} {
		var n NetConf
		if err := json.Unmarshal([]byte(conf), &n); err != nil {
			t.Fatal(err)
		}
		v, err := n.validity()
		if err != nil {
			t.Errorf("%s: %v", conf, err)
		}
		for _, a := range []Attachment{eth0, eth1, whole, other} {
			if v.has(a) != slices.Contains(keeps, a) {
				t.Errorf("%s: keeps %v: %t", conf, a, v.has(a))
			}
		}
	}
	for conf, code := range map[string]uint{
		`{"cni.dev/valid-attachments":{}}`:                  types.ErrDecodingFailure,
		`{"cni.dev/valid-attachments":[{"ifname":"eth0"}]}`: types.ErrInvalidNetworkConfig,
	} {
		var n NetConf
		if err := json.Unmarshal([]byte(conf), &n); err != nil {
			t.Fatal(err)
		}
		_, err := n.validity()
		if e, ok := err.(*types.Error); !ok || e.Code != code {
			t.Errorf("%s: %v", conf, err)
		}
	}
}

// TestParseReservation states which files of host-local's directory are reservations.
func TestParseReservation(t *testing.T) {
	for _, test := range []struct {
		name, text string
		owner      Attachment
		ok         bool
	}{
		{"10.5.7.2", "c\r\neth0", Attachment{ContainerID: "c", IfName: "eth0"}, true},
		{"10.5.7.2", " c\r\neth0\n", Attachment{ContainerID: "c", IfName: "eth0"}, true},
		{"10.5.7.2", "c", Attachment{ContainerID: "c"}, true},
		{"10.5.7.2", "", Attachment{}, true}, // host-local was killed
		{"10.5.7.2", " ", Attachment{}, false},
		{"10.5.7.2", "two words", Attachment{}, false},
		{"10.5.7.2", "c\r\nan interface", Attachment{}, false},
		{"fd00:5::2", "c\r\neth0", Attachment{ContainerID: "c", IfName: "eth0"}, true},
		{"fe80::1%eth0", "c\r\neth0", Attachment{}, false},
		{"lock", "", Attachment{}, false},
		{"last_reserved_ip.0", "10.5.7.2", Attachment{}, false},
	} {
		r, ok := parseReservation(test.name, []byte(test.text))
		if ok != test.ok || ok && (r.Owner != test.owner || r.Addr.String() != test.name) {
			t.Errorf("%s %q: %+v, %t", test.name, test.text, r, ok)
		}
	}
}

// TestPortmapOwners finds the containers of port-mapping rules of this network only.
func TestPortmapOwners(t *testing.T) {
	const iptables = `-N CNI-HOSTPORT-DNAT
-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \"cbr0\" id: \"aa11\"" -m multiport --dports 80 -j CNI-DN-1
-A CNI-HOSTPORT-DNAT -p udp -m comment --comment "dnat name: \"cbr0\" id: \"aa11\"" -m multiport --dports 53 -j CNI-DN-1
-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \"other\" id: \"bb22\"" -m multiport --dports 81 -j CNI-DN-2
-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \"cbr0\" id: \"cc3" -m multiport --dports 82 -j CNI-DN-3
-A PREROUTING -m comment --comment "dnat name: \"cbr0\" id: \"dd44\"" -j CNI-HOSTPORT-DNAT
`
	if got := iptablesOwners([]byte(iptables), "cbr0"); !slices.Equal(got, []string{"aa11"}) {
		t.Errorf("iptables: %q", got)
	}
	const nft = `{"nftables":[{"metainfo":{}},{"rule":{"comment":"aa11","expr":[{"dnat":{"addr":"10.5.7.2","port":80}}]}},
		{"rule":{"comment":"aa11","expr":[{"accept":null}]}},{"rule":{"comment":"bb22","expr":[{"dnat":{"addr":"10.9.7.2","port":80}}]}},
		{"rule":{"expr":[{"dnat":{"addr":"10.5.7.3"}}]}},{"rule":{"comment":"cc33","expr":[{"match":{"right":{"prefix":{"addr":"fd00:5:0:7::2","len":128}}}}]}}]}`
	got := nftablesOwners([]byte(nft), []netip.Prefix{netip.MustParsePrefix("10.5.7.0/24"), netip.MustParsePrefix("fd00:5:0:7::/64")})
	if len(got) != 3 || !got["aa11"] || got["bb22"] || !got["cc33"] {
		t.Errorf("nftables: %v", got)
	}
	if got := nftablesOwners([]byte("Error: No such file"), nil); len(got) != 0 {
		t.Errorf("of an error: %v", got)
	}
}

// TestDelegateErrors states what the plugin makes of a delegate's error.
func TestDelegateErrors(t *testing.T) {
	full := types.NewError(types.ErrInternal, "failed to allocate for range 0: no IP addresses available in range set: 10.5.7.1-10.5.7.254", "")
	other := types.NewError(types.ErrInternal, "broken", "")
	if !noAddressLeft(full) || noAddressLeft(other) || noAddressLeft(net.ErrClosed) {
		t.Error("noAddressLeft")
	}
	for code, want := range map[uint]bool{types.ErrInvalidEnvironmentVariables: true, types.ErrIncompatibleCNIVersion: true, types.ErrInternal: false} {
		if unsupportedVerb(types.NewError(code, "x", "")) != want {
			t.Errorf("unsupportedVerb of code %d: %t", code, !want)
		}
	}
	if e, ok := wrapped("deleting", full).(*types.Error); !ok || e.Code != full.Code || !strings.HasPrefix(e.Msg, "deleting") {
		t.Errorf("wrapped: %v", e)
	}
}
