package subnet_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"culvert/internal/fuzzloop"
	"culvert/subnet"
)

func network(prefix string, length int, first, last string) subnet.Network {
	return subnet.Network{
		Prefix: netip.MustParsePrefix(prefix), SubnetLen: length,
		SubnetMin: netip.MustParseAddr(first), SubnetMax: netip.MustParseAddr(last),
	}
}

func TestParseConfigDefaults(t *testing.T) {
	vxlan := subnet.BackendConfig{Type: "vxlan", VNI: 1, Port: 8472}
	for text, want := range map[string]subnet.Config{
		`{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}`: {
			Backend: vxlan, Networks: []subnet.Network{network("10.5.0.0/16", 24, "10.5.1.0", "10.5.255.0")},
		},
		`{"Network":"10.0.0.0/22","Backend":{"Type":"vxlan"}}`: {
			Backend: vxlan, Networks: []subnet.Network{network("10.0.0.0/22", 24, "10.0.1.0", "10.0.3.0")},
		},
		`{"Network":"10.0.0.0/23","Backend":{"Type":"vxlan"}}`: {
			Backend: vxlan, Networks: []subnet.Network{network("10.0.0.0/23", 25, "10.0.0.128", "10.0.1.128")},
		},
		`{"Network":"10.0.0.0/28","Backend":{"Type":"ipip","MTU":1400,"DirectRouting":true}}`: {
			Backend:  subnet.BackendConfig{Type: "ipip", MTU: 1400, DirectRouting: true},
			Networks: []subnet.Network{network("10.0.0.0/28", 30, "10.0.0.4", "10.0.0.12")},
		},
		`{"Network":"10.0.0.0/8","SubnetLen":20,"SubnetMin":"10.10.0.0","SubnetMax":"10.99.0.0","Backend":{"Type":"host-gw"}}`: {
			Backend:  subnet.BackendConfig{Type: "host-gw"},
			Networks: []subnet.Network{network("10.0.0.0/8", 20, "10.10.0.0", "10.99.0.0")},
		},
		`{"EnableIPv6":true,"EnableNFTables":true,"Network":"10.5.0.0/16","IPv6Network":"2001:cafe:42::/56",
		  "Backend":{"Type":"vxlan","VNI":4096,"Port":4789,"GBP":true,"Learning":true,"DirectRouting":true}}`: {
			EnableNFTables: true,
			Backend:        subnet.BackendConfig{Type: "vxlan", VNI: 4096, Port: 4789, GBP: true, Learning: true, DirectRouting: true},
			Networks: []subnet.Network{
				network("10.5.0.0/16", 24, "10.5.1.0", "10.5.255.0"),
				network("2001:cafe:42::/56", 64, "2001:cafe:42:1::", "2001:cafe:42:ff::"),
			},
		},
		`{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/63","Backend":{"Type":"vxlan","VNI":0}}`: {
			Backend:  subnet.BackendConfig{Type: "vxlan", Port: 8472},
			Networks: []subnet.Network{network("fd00::/63", 65, "fd00:0:0:0:8000::", "fd00:0:0:1:8000::")},
		},
		`{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"8000::/1","Backend":{"Type":"host-gw"}}`: {},
	} {
		got, warnings, err := subnet.ParseConfig([]byte(text))
		if len(want.Networks) == 0 {
			if err == nil {
				t.Errorf("%s was accepted", text)
			}
			continue
		}
		if err != nil || len(warnings) != 0 || !reflect.DeepEqual(got, want) {
			t.Errorf("%s:\n got %+v %v %v\nwant %+v", text, got, warnings, err, want)
			continue
		}
		out, err := json.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		var again subnet.Config
		if err := json.Unmarshal(out, &again); err != nil || !reflect.DeepEqual(again, want) {
			t.Errorf("%s came back from %s as %+v, %v", text, out, again, err)
		}
	}
}

func TestMarshalConfig(t *testing.T) {
	cfg, _, err := subnet.ParseConfig([]byte(`{"Network":"10.5.0.0/16"}`))
	if err != nil {
		t.Fatal(err)
	}
	out, err := json.Marshal(cfg)
	const want = `{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.255.0","SubnetLen":24,"Backend":{"Type":"vxlan","VNI":1,"Port":8472}}`
	if err != nil || string(out) != want {
		t.Errorf("got %s, %v", out, err)
	}
}

func TestParseConfigRefusals(t *testing.T) {
	v4 := func(more string) string { return `{"Network":"10.5.0.0/16"` + more + `}` }
	for text, rule := range map[string]string{
		``:                              "not JSON",
		`{`:                             "not JSON",
		`[]`:                            "expected a JSON object, not array",
		`null`:                          "not null",
		`{} {}`:                         "not JSON",
		`{}`:                            "Network is missing",
		"\xff{}":                        "not JSON",
		`{"Network":"10.5.0.0"}`:        "not a network such as",
		`{"Network":7}`:                 "Network must be a string, not number",
		`{"Network":"0.0.0.0/0"}`:       "whole address space",
		`{"Network":"fd00::/48"}`:       "wrong address family",
		`{"Network":"127.0.0.0/8"}`:     "hosts cannot use",
		`{"Network":"224.0.0.0/8"}`:     "hosts cannot use",
		`{"Network":"10.5.0.0/29"}`:     "four subnets of four addresses, a /28",
		v4(`,"SubnetLen":17`):           "must be at least 18",
		v4(`,"SubnetLen":31`):           "at most 30",
		v4(`,"SubnetLen":-1`):           "at most 30",
		v4(`,"SubnetLen":24.5`):         "SubnetLen must be a whole number",
		v4(`,"SubnetLen":"24"`):         "SubnetLen must be a whole number, not string",
		v4(`,"SubnetMin":"10.6.0.0"`):   "SubnetMin 10.6.0.0 is outside 10.5.0.0/16",
		v4(`,"SubnetMax":"10.4.0.0"`):   "SubnetMax 10.4.0.0 is outside 10.5.0.0/16",
		v4(`,"SubnetMin":"10.5.1.7"`):   "not the first address of a /24; that is 10.5.1.0",
		v4(`,"SubnetMax":"10.5.9.128"`): "not the first address of a /24; that is 10.5.9.0",
		v4(`,"SubnetMin":"hello"`):      "not an IP address",
		v4(`,"SubnetMin":"10.5.9.0","SubnetMax":"10.5.8.0"`):                         "SubnetMin 10.5.9.0 is above SubnetMax 10.5.8.0",
		v4(`,"EnableIPv4":false`):                                                    "no address family",
		v4(`,"EnableIPv6":true`):                                                     "IPv6Network is missing",
		v4(`,"EnableIPv6":true,"IPv6Network":"10.6.0.0/16"`):                         "wrong address family",
		v4(`,"EnableIPv6":true,"IPv6Network":"::ffff:0:0/96"`):                       "wrong address family",
		v4(`,"EnableIPv6":true,"IPv6Network":"fe80::/64"`):                           "hosts cannot use",
		v4(`,"EnableIPv6":true,"IPv6Network":"fd00::/125"`):                          "addresses, a /124",
		v4(`,"Backend":{"Type":"vxlann"}`):                                           `did you mean "vxlan"?`,
		v4(`,"Backend":{"Type":"udp"}`):                                              "culvert supports vxlan, ipip, host-gw",
		v4(`,"Backend":"vxlan"`):                                                     "Backend: expected a JSON object, not string",
		v4(`,"Backend":{"VNI":16777216}`):                                            "24 bits",
		v4(`,"Backend":{"VNI":-1}`):                                                  "24 bits",
		v4(`,"Backend":{"Port":65536}`):                                              "1 to 65535",
		v4(`,"Backend":{"MTU":100}`):                                                 "576 to 65535",
		v4(`,"Backend":{"MTU":"1400"}`):                                              "MTU must be a whole number",
		v4(`,"Backend":{"GBP":"yes"}`):                                               "GBP must be true or false",
		strings.Repeat(" ", subnet.MaxValueLen+1):                                    "over the limit",
		v4(`,"EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"ipip"}`): "only IPv4",
		v4(`,"EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"MTU":1200}`):    "IPv6 requires at least 1280",
	} {
		_, _, err := subnet.ParseConfig([]byte(text))
		if err == nil || !strings.Contains(err.Error(), rule) {
			t.Errorf("%.80s: got %v, want %q", text, err, rule)
		}
	}
}

func TestParseConfigWarnings(t *testing.T) {
	for text, want := range map[string]string{
		`{"Network":"10.5.0.0/16","SubnetLne":25,"Backend":{"Type":"vxlan"}}`:                                                 `[SubnetLne: unknown key, ignored; did you mean "SubnetLen"?]`,
		`{"Network":"10.5.0.0/16","zzz":1,"Backend":{"Type":"vxlan"}}`:                                                        `[zzz: unknown key, ignored]`,
		`{"network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}`:                                                                `[]`,
		`{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","Prot":4789}}`:                                                    `[Backend.Prot: unknown key, ignored; did you mean "Port"?]`,
		`{"Network":"10.5.0.0/16","Backend":{"Type":"ipip","VNI":1}}`:                                                         `[Backend.VNI: has no effect with ipip]`,
		`{"Network":"10.5.0.0/16","IPv6Network":"fd00::/48","Backend":{"Type":"vxlan"}}`:                                      `[IPv6Network: has no effect without "EnableIPv6": true]`,
		`{"EnableIPv4":false,"EnableIPv6":true,"Network":"10.5.0.0/16","IPv6Network":"fd00::/48","Backend":{"Type":"vxlan"}}`: `[Network: has no effect while EnableIPv4 is false]`,
		// Accepted by flannel, but probably not intended.
		`{"Network":"10.5.0.7/16","Backend":{"Type":"VXLAN"}}`:                                           `[Backend.Type: "VXLAN" is read as "vxlan" Network: 10.5.0.7/16 has host bits set; the network is 10.5.0.0/16]`,
		`{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::7/48","Backend":{"Type":"Host-GW"}}`: `[Backend.Type: "Host-GW" is read as "host-gw" IPv6Network: fd00::7/48 has host bits set; the network is fd00::/48]`,
		`{"Network":"10.5.0.0/16"}`: `[Backend.Type: not set: culvert defaults to vxlan, flannel to udp]`,
	} {
		_, warnings, err := subnet.ParseConfig([]byte(text))
		if got := fmt.Sprint(warnings); err != nil || got != want {
			t.Errorf("%s:\n got %s, %v\nwant %s", text, got, err, want)
		}
	}
}

func TestCheckUnderlay(t *testing.T) {
	cfg, _, err := subnet.ParseConfig([]byte(`{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48"}`))
	if err != nil {
		t.Fatal(err)
	}
	for underlay, bad := range map[string]bool{
		"192.168.1.0/24": false, "10.4.0.0/16": false, "10.5.3.0/24": true, "10.0.0.0/8": true,
		"fd00:5:0:1::/64": true, "fd00:6::/48": false, "10.5.3.7/24": true,
	} {
		if err := cfg.CheckUnderlay([]netip.Prefix{netip.MustParsePrefix(underlay)}); (err != nil) != bad {
			t.Errorf("%s: %v", underlay, err)
		}
	}
}

func TestAdmits(t *testing.T) {
	l := goldenLeases[0].lease // 10.5.52.0/24, vxlan, VNI 1
	for text, fault := range map[string]string{
		`{"Network":"10.5.0.0/16"}`:                                             "",
		`{"Network":"10.4.0.0/15","SubnetLen":25}`:                              "",
		`{"Network":"10.5.0.0/16","SubnetMin":"10.5.99.0"}`:                     "",
		`{"Network":"10.6.0.0/16"}`:                                             "outside",
		`{"Network":"10.5.0.0/16","Backend":{"VNI":2}}`:                         "VNI",
		`{"Network":"10.5.0.0/16","Backend":{"Type":"ipip"}}`:                   "backend",
		`{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}`: "families",
	} {
		cfg, _, err := subnet.ParseConfig([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		err = cfg.Admits(l)
		if fault == "" && err != nil || fault != "" && (err == nil || !strings.Contains(err.Error(), fault)) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func FuzzParseConfig(std *testing.F) {
	f := fuzzloop.Of(std)
	f.Add([]byte(`{"Network":"10.5.0.0/16","SubnetLen":25,"SubnetMin":"10.5.9.0","Backend":{"Type":"vxlan","VNI":7}}`))
	f.Add([]byte(`{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/1","Backend":{"Type":"host-gw"}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		cfg, _, err := subnet.ParseConfig(text)
		if err != nil {
			return
		}
		out, err := json.Marshal(cfg)
		if err != nil {
			t.Fatal(err)
		}
		again, warnings, err := subnet.ParseConfig(out)
		if err != nil || len(warnings) != 0 || !reflect.DeepEqual(cfg, again) {
			t.Fatalf("%q was read as %+v, written as %s and read as %+v, %v, %v", text, cfg, out, again, warnings, err)
		}
		for _, n := range cfg.Networks {
			p, err := subnet.Search{Network: n, Seed: 1<<64 - 1}.Next()
			if err != nil || !n.Fits(p) {
				t.Fatalf("%q: no subnet in the empty network %+v: %v, %v", text, n, p, err)
			}
		}
	})
}
