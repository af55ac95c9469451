package etcd

import (
	"maps"
	"net/netip"
	"strings"
	"testing"

	"culvert/subnet"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// raw returns all keys and values under the registry's prefix.
func raw(t *testing.T, r *Registry) map[string]string {
	t.Helper()
	resp, err := r.client.Get(t.Context(), r.directory(), clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, kv := range resp.Kvs {
		all[string(kv.Key)] = string(kv.Value)
	}
	return all
}

// A node writes, byte for byte, flannel's keys and values with the node's identity
// appended, and the quarantine mark under a key that flannel does not read.
func TestBytesInEtcd(t *testing.T) {
	t.Parallel()
	endpoint := share(t)
	for name, c := range map[string]struct {
		config   string
		previous []string
		want     map[string]string
	}{
		"ipv4": {
			`{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}`,
			[]string{"10.5.52.0/24"},
			map[string]string{
				"subnets/10.5.52.0-24":      `{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"7a:72:d7:f6:12:8f"},"NodeID":"node-1"}`,
				"culvert/used/10.5.52.0-24": `{"NodeID":"node-1"}`,
			},
		},
		"dual stack": {
			`{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:12::/48","Backend":{"Type":"vxlan"}}`,
			[]string{"10.5.52.0/24", "fd00:12:0:13::/64"},
			map[string]string{
				"subnets/10.5.52.0-24&fd00:12:0:13::-64": `{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"vxlan",` +
					`"BackendData":{"VNI":1,"VtepMAC":"7a:72:d7:f6:12:8f"},"BackendV6Data":{"VNI":1,"VtepMAC":"` + subnet.DeriveMAC("node-1", 1, true).String() + `"},"NodeID":"node-1"}`,
				"culvert/used/10.5.52.0-24&fd00:12:0:13::-64": `{"NodeID":"node-1"}`,
			},
		},
		"ipip": {
			`{"Network":"10.5.0.0/16","Backend":{"Type":"ipip"}}`,
			[]string{"10.5.52.0/24"},
			map[string]string{
				"subnets/10.5.52.0-24":      `{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"ipip","NodeID":"node-1"}`,
				"culvert/used/10.5.52.0-24": `{"NodeID":"node-1"}`,
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := open(t, endpoint, at(t, strings.ReplaceAll(name, " ", "-")), withQuarantine(3600e9))
			setConfig(t, r, c.config)
			cl := claim(t, c.config, 1)
			for _, p := range c.previous {
				cl.Previous = append(cl.Previous, netip.MustParsePrefix(p))
			}
			l := acquire(t, r, cl)
			r.keepMark(t.Context(), l)
			want := map[string]string{r.configKey(): c.config}
			for k, v := range c.want {
				want[r.directory()+k] = v
			}
			if got := raw(t, r); !maps.Equal(got, want) {
				t.Errorf("etcd has\n%v\nwant\n%v", got, want)
			}
		})
	}
}

// flannel's leases are read: its dual-stack nodes are peers in both families;
// leases of other backends are rejected, with the reason, and not modified.
func TestFlannelsBytesAreRead(t *testing.T) {
	t.Parallel()
	const config = `{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:12::/48","Backend":{"Type":"vxlan"}}`
	r := open(t, share(t))
	setConfig(t, r, config)
	if _, err := r.Config(t.Context()); err != nil {
		t.Fatal(err)
	}
	others := map[string]string{
		"subnets/10.5.1.0-24&fd00:12:0:1::-64": `{"PublicIP":"192.0.2.101","PublicIPv6":"2001:db8::101","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},"BackendV6Data":{"VNI":1,"VtepMAC":"06:6c:a5:9b:8e:d7"}}`,
		"subnets/10.5.2.0-24":                  `{"PublicIP":"192.0.2.102","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"PublicKey":"kUtLGDmx","Port":51820}}`,
		"subnets/10.5.3.0-24":                  `{"PublicIP":"192.0.2.103","PublicIPv6":null,"BackendType":"host-gw"}`,
		"subnets/10.5.4.0-24":                  `{"PublicIP":"192.0.2.104","PublicIPv6":null,"BackendType":"udp","BackendData":{}}`,
		"subnets/10.5.5.0-24":                  `{"PublicIP":"192.0.2.105","PublicIPv6":null}`, // a reservation
		"subnets/10.5.6.0-24":                  `{"PublicIP":"192.0.2.106","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:46"}}`,
	}
	for k, v := range others {
		put(t, r, k, v)
	}
	l := acquire(t, r, claim(t, config, 1))
	w := watch(t, r, l)
	eventually(t, "the leases", func() bool { return len(w.last().Peers) == 2 })
	s := w.last()
	if both := s.Peers[0]; len(both.Endpoints) != 2 || both.Endpoints[1].Public.String() != "2001:db8::101" || both.Endpoints[1].VTEP.MAC.String() != "06:6c:a5:9b:8e:d7" {
		t.Errorf("the dual-stack peer is %+v", both)
	}
	if len(s.Rejected) != 3 || s.Rejected[0].Key != "10.5.2.0-24" || !strings.Contains(s.Rejected[0].Reason, `"wireguard"`) {
		t.Errorf("rejected: %v", s.Rejected)
	}
	for k, v := range raw(t, r) {
		if want, ok := others[strings.TrimPrefix(k, r.directory())]; ok && v != want {
			t.Errorf("%s became %s", k, v)
		}
	}
}
