package api

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
)

// TestPeersOnTheSocket checks that the daemon answers with what json.Marshal writes, and that
// GetPeers reads it back, with any number of peers and fields that this version does not
// know, but no answer that is cut.
func TestPeersOnTheSocket(t *testing.T) {
	for _, n := range []int{0, 1, 256, 257, 768} {
		p := Peers{Node: "n1", At: time.Now().UTC().Round(0), MTU: 1450, Peers: []PeerState{}}
		for i := range n {
			p.Peers = append(p.Peers, PeerState{
				Node: fmt.Sprint(i), Subnet: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24), State: PeerIdle,
				Sent: &PeerCount{Packets: uint64(i)},
			})
		}
		w := httptest.NewRecorder()
		Handler(nil, func() Peers { return p }, nil).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/peers", http.NoBody))
		text := w.Body.String()
		if want, err := json.Marshal(p); err != nil || strings.TrimSpace(text) != string(want) {
			t.Errorf("%d peers: %s, want %s", n, text, want)
		}
		later := strings.Replace(text, `"mtu"`, `"later":{"a":[1]},"mtu"`, 1)
		if got, err := peersFrom(t, later); err != nil || !reflect.DeepEqual(got, p) {
			t.Errorf("%d peers: read back as %+v, %v", n, got, err)
		}
		if got, err := peersFrom(t, later[:len(later)-3]); err == nil {
			t.Errorf("%d peers: a cut answer is read as %+v", n, got)
		}
	}
}

// peersFrom returns what GetPeers makes of a daemon's answer.
func peersFrom(t *testing.T, answer string) (Peers, error) {
	t.Helper()
	dir := t.TempDir()
	l, err := Listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, answer) })}
	go func() { _ = server.Serve(l) }()
	defer server.Close()
	return GetPeers(t.Context(), dir)
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
		go func() { _ = w.CloseWithError(json.NewEncoder(w).Encode(p)) }()
		var got Peers
		if err := json.NewDecoder(r).Decode(&got); err != nil || len(got.Peers) != len(p.Peers) {
			b.Fatal(err)
		}
	}
}
