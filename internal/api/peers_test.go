package api

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
)

// TestStreamedPeers checks that what is streamed is what json.Marshal writes, and is read
// back, with any number of peers and fields that this version does not know.
func TestStreamedPeers(t *testing.T) {
	for _, n := range []int{0, 1, streamed, streamed + 1, 3 * streamed} {
		p := Peers{Node: "n1", At: time.Now().UTC().Round(0), MTU: 1450, Peers: []PeerState{}}
		for i := range n {
			p.Peers = append(p.Peers, PeerState{
				Node: fmt.Sprint(i), Subnet: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24), State: PeerIdle,
				Sent: &PeerCount{Packets: uint64(i)},
			})
		}
		var b bytes.Buffer
		if err := p.stream(&b); err != nil {
			t.Fatal(err)
		}
		if want, err := json.Marshal(p); err != nil || strings.TrimSpace(b.String()) != string(want) {
			t.Errorf("%d peers: %s, want %s", n, b.String(), want)
		}
		later := strings.Replace(b.String(), `"mtu"`, `"later":{"a":[1]},"mtu"`, 1)
		if got, err := readPeers(strings.NewReader(later)); err != nil || !reflect.DeepEqual(got, p) {
			t.Errorf("%d peers: read back as %+v, %v", n, got, err)
		}
		if got, err := readPeers(strings.NewReader(later[:len(later)-3])); err == nil {
			t.Errorf("%d peers: a cut answer is read as %+v", n, got)
		}
	}
}

// BenchmarkPeers is how long 5,000 peers take from the daemon to a command.
func BenchmarkPeers(b *testing.B) {
	drops := uint64(3)
	var p Peers
	for i := range 5000 {
		p.Peers = append(p.Peers, PeerState{
			Node: fmt.Sprint("node-", i), Backend: "vxlan", Subnet: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24),
			PublicIP: netip.AddrFrom4([4]byte{198, 19, byte(i >> 8), byte(i)}), Way: WayKernel, State: PeerIdle, RTTSeconds: .000123, PathMTU: 1450,
			Heard: time.Now(), Asked: time.Now(), Sent: &PeerCount{1, 2}, Received: &PeerCount{3, 4}, Drops: &drops,
		})
	}
	for b.Loop() {
		r, w := io.Pipe()
		go func() { _ = w.CloseWithError(p.stream(w)) }()
		if got, err := readPeers(r); err != nil || len(got.Peers) != len(p.Peers) {
			b.Fatal(err)
		}
	}
}
