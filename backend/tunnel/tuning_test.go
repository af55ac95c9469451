package tunnel

import (
	"net/netip"
	"runtime"
	"strings"
	"testing"

	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/subnet"
)

// TestTuning checks the number of threads and source ports, by flag and by default.
func TestTuning(t *testing.T) {
	cpus := runtime.NumCPU()
	ports := 8
	if cpus <= 2 {
		ports = 1
	}
	for _, c := range []struct {
		name          string
		tuning        Tuning
		queues, ports int
	}{
		{"default", Tuning{}, min(max(cpus-1, 1), 8), ports},
		{"given", Tuning{Queues: 5, SourcePorts: 3}, 5, 3},
		{"one queue, whatever is given", Tuning{Queues: 5, NoMultiQueue: true}, 1, ports},
	} {
		if q, p := c.tuning.queues(), c.tuning.sourcePorts(); q != c.queues || p != c.ports {
			t.Errorf("%s: %d queues, %d source ports", c.name, q, p)
		}
	}
}

// TestShape checks that a successor inherits descriptors only with flags that they do not
// depend on.
func TestShape(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*Tuning)
		same   bool
	}{
		{"the same", func(*Tuning) {}, true},
		{"no busy polling", func(o *Tuning) { o.NoBusyPoll = true }, true},
		{"no GSO", func(o *Tuning) { o.NoGSO = true }, true},
		{"another number of queues", func(o *Tuning) { o.Queues++ }, false},
		{"one queue", func(o *Tuning) { o.NoMultiQueue = true }, false},
		{"DF", func(o *Tuning) { o.DontFragment = true }, false},
	} {
		before := Tuning{Queues: 2}
		after := before
		c.change(&after)
		if same := before.Shape() == after.Shape(); same != c.same {
			t.Errorf("%s: %q and %q", c.name, before.Shape(), after.Shape())
		}
	}
}

// TestMechanism checks what the status says of an offload.
func TestMechanism(t *testing.T) {
	for _, c := range []struct {
		on, disabled bool
		refused      int
		want         api.Mechanism
	}{
		{true, false, 0, api.Mechanism{Name: "gso", On: true}},
		{true, false, 2, api.Mechanism{Name: "gso", On: true, Why: "the kernel refuses it with 2 peers, and is asked again within a minute"}},
		{false, true, 0, api.Mechanism{Name: "gso", Why: "turned off by flag"}},
		{false, false, 0, api.Mechanism{Name: "gso", Why: "the kernel does not offer it"}},
	} {
		if got := mechanism("gso", c.on, c.disabled, c.refused); got != c.want {
			t.Errorf("%+v, want %+v", got, c.want)
		}
	}
}

// TestPodMTU checks that pods' packets fit with the tunnel's headers over each family.
func TestPodMTU(t *testing.T) {
	end := func(subnetOf, public string) subnet.Endpoint {
		return subnet.Endpoint{Subnet: netip.MustParsePrefix(subnetOf), Public: netip.MustParseAddr(public)}
	}
	four, six := end("10.5.1.0/24", "192.0.2.1"), end("fd00:1::/64", "2001:db8::1")
	for _, c := range []struct {
		name string
		kind string
		mtu  int // Backend.MTU
		link int
		ends []subnet.Endpoint
		want int
		says string
	}{
		{"vxlan", "vxlan", 0, 1500, []subnet.Endpoint{four}, 1450, ""},
		{"vxlan over IPv6", "vxlan", 0, 1500, []subnet.Endpoint{six}, 1430, ""},
		{"vxlan over both: the larger header", "vxlan", 0, 1500, []subnet.Endpoint{four, six}, 1430, ""},
		{"ipip", "ipip", 0, 1500, []subnet.Endpoint{four}, 1480, ""},
		{"configured", "vxlan", 1400, 1500, []subnet.Endpoint{four}, 1350, ""},
		{"too small for IPv6 in pods", "vxlan", 0, 1300, []subnet.Endpoint{four, six}, 0, "less than 1280"},
	} {
		l := subnet.Lease{Endpoints: c.ends}
		got, err := PodMTU(subnet.BackendConfig{Type: c.kind, MTU: c.mtu}, l, host.Underlay{Name: "eth0", MTU: c.link})
		if got != c.want || (err != nil) != (c.says != "") || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %d, %v", c.name, got, err)
		}
	}
}
