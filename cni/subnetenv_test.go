package cni

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"culvert/internal/boottime"
	"culvert/internal/fuzzloop"
	"culvert/internal/statefile"
)

func prefixes(s ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

const dualStackText = `FLANNEL_NETWORK=10.5.0.0/16
FLANNEL_SUBNET=10.5.72.1/24
FLANNEL_IPV6_NETWORK=fd00:12::/48
FLANNEL_IPV6_SUBNET=fd00:12:0:13::1/64
FLANNEL_MTU=1430
FLANNEL_IPMASQ=true
`

var dualStack = SubnetEnv{
	Networks: prefixes("10.5.0.0/16", "fd00:12::/48"),
	Gateways: prefixes("10.5.72.1/24", "fd00:12:0:13::1/64"),
	MTU:      1430,
	IPMasq:   true,
}

func TestSubnetEnvIsFlannels(t *testing.T) {
	for text, want := range map[string]SubnetEnv{
		dualStackText: dualStack,
		"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n": {
			Networks: prefixes("10.5.0.0/16"), Gateways: prefixes("10.5.72.1/24"), MTU: 1450,
		},
		"FLANNEL_IPV6_NETWORK=fd00:12::/48\nFLANNEL_IPV6_SUBNET=fd00:12:0:13::1/64\nFLANNEL_MTU=1280\nFLANNEL_IPMASQ=true\n": {
			Networks: prefixes("fd00:12::/48"), Gateways: prefixes("fd00:12:0:13::1/64"), MTU: 1280, IPMasq: true,
		},
		"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\nCULVERT_LEASE_EXPIRES=2026-02-03T04:05:06Z\n": {
			Networks: prefixes("10.5.0.0/16"), Gateways: prefixes("10.5.72.1/24"), MTU: 1450, Expires: time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC),
		},
		"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\nCULVERT_LEASE_EXPIRES=2026-02-03T04:05:06Z\nCULVERT_LEASE_EXPIRES_BOOTTIME=86400@8f3e\n": {
			Networks: prefixes("10.5.0.0/16"), Gateways: prefixes("10.5.72.1/24"), MTU: 1450, Expires: time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC),
			ExpiresUp: 24 * time.Hour, Boot: "8f3e",
		},
		// flannel separates several networks with commas.
		"FLANNEL_NETWORK=10.5.0.0/16,10.7.0.0/16\nFLANNEL_SUBNET=10.7.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n": {
			Networks: prefixes("10.5.0.0/16", "10.7.0.0/16"), Gateways: prefixes("10.7.1.1/24"), MTU: 1450, IPMasq: true,
		},
	} {
		got, err := ParseSubnetEnv([]byte(text))
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q\nwas parsed as %+v (%v)\nwant          %+v", text, got, err, want)
		}
		if back := string(want.Marshal()); back != text {
			t.Errorf("%+v\nwas written as %q\nwant           %q", want, back, text)
		}
	}
}

func TestSubnetEnvTolerates(t *testing.T) {
	for _, text := range []string{
		"# flannel wrote this\n\n" + dualStackText,
		dualStackText + "FLANNEL_SOMETHING_NEW=x=y\n",
		strings.ReplaceAll(dualStackText, "\n", "\r\n"),
		strings.TrimSuffix(dualStackText, "\n"),
		strings.Replace(dualStackText, "10.5.0.0/16", "10.5.3.3/16", 1),
	} {
		if got, err := ParseSubnetEnv([]byte(text)); err != nil || !reflect.DeepEqual(got, dualStack) {
			t.Errorf("%q was parsed as %+v: %v", text, got, err)
		}
	}
}

func TestSubnetEnvRefuses(t *testing.T) {
	for _, c := range []struct{ replace, by, says string }{
		{dualStackText, "", "FLANNEL_MTU is missing"},
		{"FLANNEL_MTU=1430\n", "", "FLANNEL_MTU is missing"},
		{"FLANNEL_IPMASQ=true\n", "", "FLANNEL_IPMASQ is missing"},
		{"FLANNEL_IPMASQ=true\n", "FLANNEL_IPMASQ=yes\n", `FLANNEL_IPMASQ="yes": neither true nor false`},
		{"=1430", "=1430 bytes", "not a number"},
		{"FLANNEL_MTU", "CULVERT_LEASE_EXPIRES=tomorrow\nFLANNEL_MTU", "not an RFC 3339 time"},
		{"FLANNEL_MTU", "CULVERT_LEASE_EXPIRES=\nFLANNEL_MTU", "not an RFC 3339 time"},
		{"=1430", "=-1", "not between 68 and 65535"},
		{"=1430", "=99999999999999999999", "not a number"},
		{"=1430", "=1279", "FLANNEL_MTU=1279 is below 1280, the minimum for IPv6"},
		{"FLANNEL_NETWORK=10.5.0.0/16\n", "", "FLANNEL_NETWORK is missing"},
		{"FLANNEL_IPV6_SUBNET=fd00:12:0:13::1/64\n", "", "FLANNEL_IPV6_SUBNET is missing"},
		{"FLANNEL_SUBNET=10.5.72.1/24", "FLANNEL_SUBNET=10.6.72.1/24", "FLANNEL_SUBNET=10.6.72.1/24 is not inside FLANNEL_NETWORK"},
		{"FLANNEL_SUBNET=10.5.72.1/24", "FLANNEL_SUBNET=10.5.72.1/8", "is not inside FLANNEL_NETWORK"},
		{"FLANNEL_SUBNET=10.5.72.1/24", "FLANNEL_SUBNET=10.5.72.1", "not an address with a prefix length"},
		{"FLANNEL_SUBNET=10.5.72.1/24", "FLANNEL_SUBNET=10.5.72.1/24,10.5.73.1/24", "more than one subnet"},
		{"FLANNEL_SUBNET=10.5.72.1/24", "FLANNEL_SUBNET=fd00:12:0:13::1/64", "wrong address family"},
		{"FLANNEL_SUBNET=10.5.72.1/24", "FLANNEL_SUBNET=::ffff:10.5.72.1/120", "wrong address family"},
		{"FLANNEL_MTU", "FLANNEL_MTU=1430\nFLANNEL_MTU", "FLANNEL_MTU is set twice"},
		{"FLANNEL_MTU", "half a li\nFLANNEL_MTU", `line 5: "half a li" is not KEY=VALUE`},
		{"FLANNEL_MTU", "#" + strings.Repeat("x", maxSubnetEnv) + "\nFLANNEL_MTU", "too long"},
	} {
		text := strings.Replace(dualStackText, c.replace, c.by, 1)
		got, err := ParseSubnetEnv([]byte(text))
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%.60q for %.60q: %v, want %q", c.by, c.replace, err, c.says)
		}
		if !reflect.DeepEqual(got, SubnetEnv{}) {
			t.Errorf("%.60q for %.60q: an error and a value: %+v", c.by, c.replace, got)
		}
	}
}

func TestWriteSubnetEnv(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run", "culvert")
	path := filepath.Join(dir, "subnet.env")
	if _, err := ReadSubnetEnv(path); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "culvert status") {
		t.Errorf("reading a missing file: %v", err)
	}
	for range 2 {
		if err := WriteSubnetEnv(path, dualStack); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := ReadSubnetEnv(path); err != nil || !reflect.DeepEqual(got, dualStack) {
		t.Errorf("read back %+v: %v", got, err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o644 {
		t.Errorf("mode: %v, %v", st.Mode(), err)
	}
	wrong := dualStack
	wrong.MTU = 0
	if err := WriteSubnetEnv(path, wrong); err == nil {
		t.Error("an MTU of zero was written")
	}
	// A temporary file left by a crash is overwritten.
	if err := os.WriteFile(statefile.Temporary(path), []byte("FLANNEL_NETW"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := WriteSubnetEnv(path, dualStack); err != nil {
		t.Error(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("the directory has %v: %v", entries, err)
	}
}

// A parsed file survives a round trip and satisfies the rules that ADD relies on.
func FuzzParseSubnetEnv(std *testing.F) {
	f := fuzzloop.Of(std)
	f.Add([]byte(dualStackText))
	f.Fuzz(func(t *testing.T, text []byte) {
		e, err := ParseSubnetEnv(text)
		if err != nil {
			return
		}
		again, err := ParseSubnetEnv(e.Marshal())
		if err != nil || !reflect.DeepEqual(again, e) {
			t.Fatalf("%q was parsed as %+v, written as\n%s\nand parsed as %+v: %v", text, e, e.Marshal(), again, err)
		}
		if len(e.Gateways) == 0 || len(e.Gateways) > 2 || e.MTU < minMTU {
			t.Fatalf("%q was accepted as %+v", text, e)
		}
		for _, s := range e.Subnets() {
			inside := false
			for _, n := range e.Networks {
				inside = inside || n.Overlaps(s) && n.Bits() <= s.Bits()
			}
			if !inside {
				t.Fatalf("%q: subnet %s outside %v", text, s, e.Networks)
			}
		}
	})
}

// The wall clock may be set in either direction after the file was written.
func TestExpiryByBootTime(t *testing.T) {
	ends := time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC)
	e := SubnetEnv{Expires: ends, ExpiresUp: time.Hour, Boot: "b"}
	for name, c := range map[string]struct {
		e                 SubnetEnv
		now               boottime.Moment
		expired, disputed bool
	}{
		"before":                    {e, boottime.Moment{Boot: "b", Up: 59 * time.Minute, Wall: ends.Add(-time.Minute)}, false, false},
		"after":                     {e, boottime.Moment{Boot: "b", Up: 61 * time.Minute, Wall: ends.Add(time.Minute)}, true, false},
		"set forward by years":      {e, boottime.Moment{Boot: "b", Up: 59 * time.Minute, Wall: ends.AddDate(6, 0, 0)}, false, true},
		"set back by years":         {e, boottime.Moment{Boot: "b", Up: 61 * time.Minute, Wall: ends.AddDate(-6, 0, 0)}, true, false},
		"rebooted, after":           {e, boottime.Moment{Boot: "c", Up: time.Minute, Wall: ends.Add(time.Minute)}, true, false},
		"rebooted, before":          {e, boottime.Moment{Boot: "c", Up: 2 * time.Hour, Wall: ends.Add(-time.Minute)}, false, false},
		"without boot time, before": {SubnetEnv{Expires: ends}, boottime.Moment{Boot: "b", Up: 2 * time.Hour, Wall: ends.Add(-time.Minute)}, false, false},
		"without boot time, after":  {SubnetEnv{Expires: ends}, boottime.Moment{Boot: "b", Wall: ends.Add(time.Minute)}, true, false},
		"flannel's":                 {SubnetEnv{}, boottime.Moment{Boot: "b", Up: 2 * time.Hour, Wall: ends.AddDate(9, 0, 0)}, false, false},
	} {
		if expired, disputed := c.e.Expired(c.now); expired != c.expired || disputed != c.disputed {
			t.Errorf("%s: expired %t, disputed %t", name, expired, disputed)
		}
	}
	for _, bad := range []string{"", "5", "@b", "x@b", "-1@b", "5@", "5@a b"} {
		if _, err := ParseSubnetEnv([]byte(dualStackText + "CULVERT_LEASE_EXPIRES=2026-02-03T04:05:06Z\nCULVERT_LEASE_EXPIRES_BOOTTIME=" + bad + "\n")); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}
