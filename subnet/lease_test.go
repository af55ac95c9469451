package subnet_test

import (
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"

	"culvert/internal/fuzzloop"
	"culvert/subnet"
)

func mac(s string) subnet.MAC {
	m, err := subnet.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

func end(prefix, public string, vtep ...subnet.VTEP) subnet.Endpoint {
	e := subnet.Endpoint{Subnet: netip.MustParsePrefix(prefix)}
	if public != "" {
		e.Public = netip.MustParseAddr(public)
	}
	if len(vtep) > 0 {
		e.VTEP = vtep[0]
	}
	return e
}

// The values are what flannel 0.26 writes to etcd (etcdctl get --prefix). Those
// with a NodeID are flannel's with our identity appended.
var goldenLeases = []struct {
	name, key, value string
	lease            subnet.Lease
}{
	{
		"vxlan", "10.5.52.0-24",
		`{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}`,
		subnet.Lease{Backend: "vxlan", Endpoints: []subnet.Endpoint{
			end("10.5.52.0/24", "192.168.64.3", subnet.VTEP{VNI: 1, MAC: mac("c6:d2:32:6f:8f:44")}),
		}},
	},
	{
		"vxlan dual stack", "10.5.52.0-24&fd00:12:13::-64",
		`{"PublicIP":"192.168.64.3","PublicIPv6":"fd00::40:3","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},"BackendV6Data":{"VNI":1,"VtepMAC":"06:6c:a5:9b:8e:d7"}}`,
		subnet.Lease{Backend: "vxlan", Endpoints: []subnet.Endpoint{
			end("10.5.52.0/24", "192.168.64.3", subnet.VTEP{VNI: 1, MAC: mac("c6:d2:32:6f:8f:44")}),
			end("fd00:12:13::/64", "fd00::40:3", subnet.VTEP{VNI: 1, MAC: mac("06:6c:a5:9b:8e:d7")}),
		}},
	},
	{
		"host-gw", "10.5.34.0-24",
		`{"PublicIP":"10.37.7.195","PublicIPv6":null,"BackendType":"host-gw"}`,
		subnet.Lease{Backend: "host-gw", Endpoints: []subnet.Endpoint{end("10.5.34.0/24", "10.37.7.195")}},
	},
	{
		"ipip with an identity", "10.5.34.0-24",
		`{"PublicIP":"10.37.7.195","PublicIPv6":null,"BackendType":"ipip","NodeID":"worker-3"}`,
		subnet.Lease{Node: "worker-3", Backend: "ipip", Endpoints: []subnet.Endpoint{end("10.5.34.0/24", "10.37.7.195")}},
	},
	{
		"vxlan with an identity", "10.5.52.0-24",
		`{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":16777215,"VtepMAC":"c6:d2:32:6f:8f:44"},"NodeID":"a"}`,
		subnet.Lease{Node: "a", Backend: "vxlan", Endpoints: []subnet.Endpoint{
			end("10.5.52.0/24", "192.168.64.3", subnet.VTEP{VNI: 16777215, MAC: mac("c6:d2:32:6f:8f:44")}),
		}},
	},
	{
		"IPv6 alone", "fd00:12:13::-64",
		`{"PublicIP":"0.0.0.0","PublicIPv6":"fd00::40:3","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"06:6c:a5:9b:8e:d7"},"NodeID":"a"}`,
		subnet.Lease{Node: "a", Backend: "vxlan", Endpoints: []subnet.Endpoint{
			end("fd00:12:13::/64", "fd00::40:3", subnet.VTEP{VNI: 1, MAC: mac("06:6c:a5:9b:8e:d7")}),
		}},
	},
	{
		"reservation", "10.5.1.0-24", `{"PublicIP":"0.0.0.0","PublicIPv6":null,"NodeID":"printers"}`,
		subnet.Lease{Node: "printers", Reserved: true, Endpoints: []subnet.Endpoint{end("10.5.1.0/24", "")}},
	},
	{
		"flannel's reservation", "10.5.1.0-24", `{"PublicIP":"10.37.7.195","PublicIPv6":null}`,
		subnet.Lease{Reserved: true, Endpoints: []subnet.Endpoint{end("10.5.1.0/24", "10.37.7.195")}},
	},
}

func TestLeaseBytes(t *testing.T) {
	for _, g := range goldenLeases {
		t.Run(g.name, func(t *testing.T) {
			parsed, err := subnet.ParseLease(g.key, []byte(g.value))
			if err != nil || !reflect.DeepEqual(parsed, g.lease) {
				t.Errorf("ParseLease:\n got %+v, %v\nwant %+v", parsed, err, g.lease)
			}
			value, err := g.lease.Value()
			if err != nil || string(value) != g.value {
				t.Errorf("Value:\n got %s, %v\nwant %s", value, err, g.value)
			}
			if key := g.lease.Key(); key != g.key {
				t.Errorf("Key %q, want %q", key, g.key)
			}
		})
	}
}

// Values that other programs may write, and the expected error.
func TestParseLeaseOfOthers(t *testing.T) {
	const vxlan = `{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}`
	for name, c := range map[string]struct{ key, value, fault string }{
		"unknown keys":        {"10.5.1.0-24", vxlan + `,"Colour":"red"}`, ""},
		"null data":           {"10.5.1.0-24", `{"PublicIP":"192.168.64.3","BackendType":"host-gw","BackendData":null}`, ""},
		"unknown backend":     {"10.5.1.0-24", `{"PublicIP":"192.168.64.3","BackendType":"wireguard","BackendData":{"PublicKey":"x","Port":51820}}`, ""},
		"not JSON":            {"10.5.1.0-24", `oops`, "not a lease"},
		"empty":               {"10.5.1.0-24", ``, "not a lease"},
		"an array":            {"10.5.1.0-24", `[]`, "not a lease"},
		"something after it":  {"10.5.1.0-24", vxlan + `}{`, "not a lease"},
		"too long":            {"10.5.1.0-24", strings.Repeat(" ", subnet.MaxValueLen) + vxlan + "}", "over the limit"},
		"no address":          {"10.5.1.0-24", `{"BackendType":"host-gw"}`, "PublicIP is missing"},
		"0.0.0.0":             {"10.5.1.0-24", `{"PublicIP":"0.0.0.0","BackendType":"host-gw"}`, "PublicIP is missing"},
		"no IPv6 address":     {"10.5.1.0-24&fd00::-64", vxlan + "}", "PublicIPv6 is missing"},
		"a name":              {"10.5.1.0-24", `{"PublicIP":"localhost","BackendType":"host-gw"}`, "not an IP address"},
		"multicast":           {"10.5.1.0-24", `{"PublicIP":"224.0.0.1","BackendType":"host-gw"}`, "not a unicast"},
		"broadcast":           {"10.5.1.0-24", `{"PublicIP":"255.255.255.255","BackendType":"host-gw"}`, "not a unicast"},
		"IPv6 for IPv4":       {"10.5.1.0-24", `{"PublicIP":"::1","BackendType":"host-gw"}`, "family"},
		"a zone":              {"fd00::-64", `{"PublicIPv6":"fe80::1%eth0","BackendType":"host-gw"}`, "family"},
		"vxlan without data":  {"10.5.1.0-24", `{"PublicIP":"192.168.64.3","BackendType":"vxlan"}`, "lacks VNI and VtepMAC"},
		"vxlan with null":     {"10.5.1.0-24", `{"PublicIP":"192.168.64.3","BackendType":"vxlan","BackendData":null}`, "VtepMAC"},
		"a VNI of 25 bits":    {"10.5.1.0-24", strings.Replace(vxlan, `"VNI":1`, `"VNI":16777216`, 1) + "}", "24 bits"},
		"a negative VNI":      {"10.5.1.0-24", strings.Replace(vxlan, `"VNI":1`, `"VNI":-1`, 1) + "}", "parse the vxlan data"},
		"a group MAC":         {"10.5.1.0-24", strings.Replace(vxlan, "c6:", "c7:", 1) + "}", "not a unicast"},
		"a zero MAC":          {"10.5.1.0-24", strings.Replace(vxlan, "c6:d2:32:6f:8f:44", "00:00:00:00:00:00", 1) + "}", "not a unicast"},
		"a MAC of 8 bytes":    {"10.5.1.0-24", strings.Replace(vxlan, "c6:", "02:03:c6:", 1) + "}", "not an Ethernet"},
		"an identity in red":  {"10.5.1.0-24", vxlan + `,"NodeID":"\u001b[31m"}`, "non-printable"},
		"a long identity":     {"10.5.1.0-24", vxlan + `,"NodeID":"` + strings.Repeat("x", 254) + `"}`, "over the limit"},
		"no prefix length":    {"10.5.1.0", vxlan + "}", "not of the form"},
		"a slash":             {"10.5.1.0/24", vxlan + "}", "not of the form"},
		"host bits":           {"10.5.1.7-24", vxlan + "}", "host bits"},
		"everything":          {"0.0.0.0-0", vxlan + "}", "whole address space"},
		"a leading zero":      {"10.5.1.0-024", vxlan + "}", "not of the form"},
		"another spelling":    {"FD00::-64", vxlan + "}", "another spelling"},
		"mapped":              {"::ffff:10.5.1.0-120", vxlan + "}", "IPv4-mapped"},
		"the families turned": {"fd00::-64&10.5.1.0-24", vxlan + "}", "followed by an IPv6"},
		"two of one family":   {"10.5.1.0-24&10.5.2.0-24", vxlan + "}", "followed by an IPv6"},
		"three":               {"10.5.1.0-24&fd00::-64&fd01::-64", vxlan + "}", "more than two"},
		"a directory":         {"x/10.5.1.0-24", vxlan + "}", "not of the form"},
		"a long key":          {strings.Repeat("1", 200), vxlan + "}", "200 bytes"},
	} {
		_, err := subnet.ParseLease(c.key, []byte(c.value))
		if c.fault == "" && err != nil || c.fault != "" && (err == nil || !strings.Contains(err.Error(), c.fault)) {
			t.Errorf("%s: got %v, want %q", name, err, c.fault)
		}
	}
}

func TestValueRefusesWhatCannotBeReadBack(t *testing.T) {
	vtep := subnet.VTEP{VNI: 1, MAC: mac("c6:d2:32:6f:8f:44")}
	for name, l := range map[string]subnet.Lease{
		"no endpoint":     {Backend: "vxlan"},
		"no address":      {Backend: "ipip", Endpoints: []subnet.Endpoint{end("10.5.1.0/24", "")}},
		"no MAC":          {Backend: "vxlan", Endpoints: []subnet.Endpoint{end("10.5.1.0/24", "192.0.2.1")}},
		"families turned": {Backend: "vxlan", Endpoints: []subnet.Endpoint{end("fd00::/64", "fd01::1", vtep), end("10.5.1.0/24", "192.0.2.1", vtep)}},
		"host bits":       {Backend: "vxlan", Endpoints: []subnet.Endpoint{end("10.5.1.1/24", "192.0.2.1", vtep)}},
		"bad identity":    {Node: "a b", Backend: "vxlan", Endpoints: []subnet.Endpoint{end("10.5.1.0/24", "192.0.2.1", vtep)}},
	} {
		if value, err := l.Value(); err == nil {
			t.Errorf("%s: wrote %s", name, value)
		}
	}
}

func TestDeriveMAC(t *testing.T) {
	seen := map[subnet.MAC]bool{}
	for _, node := range []string{"a", "b", "node-1", "node-2"} {
		for _, vni := range []uint32{1, 2, subnet.MaxVNI} {
			for _, ipv6 := range []bool{false, true} {
				m := subnet.DeriveMAC(node, vni, ipv6)
				if m != subnet.DeriveMAC(node, vni, ipv6) {
					t.Errorf("%s %d %v: not deterministic", node, vni, ipv6)
				}
				if m[0]&1 != 0 || m[0]&2 == 0 || !m.IsUnicast() {
					t.Errorf("%s is not a locally administered unicast address", m)
				}
				if seen[m] {
					t.Errorf("%s is not unique", m)
				}
				seen[m] = true
			}
		}
	}
	// Peers cache the address, so it must not change between versions.
	if got := subnet.DeriveMAC("node-1", 1, false).String(); got != "7a:72:d7:f6:12:8f" {
		t.Errorf("node-1 has the MAC %s", got)
	}
}

func TestMACText(t *testing.T) {
	var m subnet.MAC
	if err := m.UnmarshalText([]byte("C6-D2-32-6F-8F-44")); err != nil || m.String() != "c6:d2:32:6f:8f:44" {
		t.Error(m, err)
	}
	for _, bad := range []string{"", "c6:d2", "c6:d2:32:6f:8f:44:00:00", "zz:d2:32:6f:8f:44"} {
		if err := m.UnmarshalText([]byte(bad)); err == nil {
			t.Errorf("accepted %q", bad)
		}
	}
}

func FuzzParseLease(std *testing.F) {
	f := fuzzloop.Of(std)
	for _, g := range goldenLeases {
		f.Add(g.key, []byte(g.value))
	}
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		l, err := subnet.ParseLease(key, value)
		if err != nil {
			return
		}
		if l.Key() != key {
			t.Fatalf("key %q became %q", key, l.Key())
		}
		again, err := l.Value()
		if err != nil {
			t.Fatalf("%q %q was parsed but cannot be encoded: %v", key, value, err)
		}
		l2, err := subnet.ParseLease(key, again)
		if err != nil || !reflect.DeepEqual(l, l2) {
			t.Fatalf("%+v was encoded as %q and parsed as %+v, %v", l, again, l2, err)
		}
		for _, e := range l.Endpoints {
			if e.Subnet != e.Subnet.Masked() || e.Subnet.Bits() == 0 || !l.Reserved && !e.Public.IsValid() {
				t.Fatalf("%q parsed to the endpoint %+v", key, e)
			}
		}
	})
}

func TestCorpusIsCommitted(t *testing.T) {
	files, err := os.ReadDir("testdata/fuzz/FuzzParseLease")
	if err != nil || len(files) < 10 {
		t.Errorf("%d seeds, %v", len(files), err)
	}
}
