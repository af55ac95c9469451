package api_test

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"

	"culvert/internal/api"
)

// TestGetStatus requests the status of a daemon on its socket, and of none.
func TestGetStatus(t *testing.T) {
	dir := t.TempDir()
	if _, err := api.GetStatus(t.Context(), dir); err == nil || !strings.Contains(err.Error(), "no daemon answers on "+api.SocketPath(dir)+": is `culvert run` running, with this --run-dir?") {
		t.Errorf("without a socket: %v", err)
	}
	l, err := api.Listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := api.Status{Node: "n1", Ready: true, Networks: []netip.Prefix{netip.MustParsePrefix("10.5.0.0/16")}}
	peers := api.Peers{Node: "n1", MTU: 1450, Peers: []api.PeerState{{Node: "n2", State: api.PeerIdle}}}
	mux := http.NewServeMux()
	looked := 0
	mux.Handle("/", api.Handler(func() api.Status { return want }, func() api.Peers { return peers }, func(context.Context) { looked++ }))
	mux.HandleFunc(api.LogPath, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusTeapot) })
	server := &http.Server{Handler: mux}
	go func() { _ = server.Serve(l) }()
	if got, err := api.GetStatus(t.Context(), dir); err != nil || got.Node != want.Node || !got.Ready || !reflect.DeepEqual(got.Networks, want.Networks) {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := api.GetStatusNow(t.Context(), dir); err != nil || got.Node != want.Node || looked != 1 {
		t.Errorf("%+v, %v, after %d looks at the host", got, err, looked)
	}
	if got, err := api.GetPeers(t.Context(), dir); err != nil || !reflect.DeepEqual(got, peers) {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := api.GetLog(t.Context(), dir); err == nil || !strings.Contains(err.Error(), "418") {
		t.Errorf("an answer that is not 200: %v", err)
	}
	// A second daemon with this run directory is refused while the first runs.
	if _, err := api.Listen(dir); err == nil || !strings.Contains(err.Error(), "another daemon (pid ") || !strings.Contains(err.Error(), "another --run-dir") {
		t.Errorf("a second daemon: %v", err)
	}
	if err := server.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(api.SocketPath(dir)); err == nil {
		t.Error("the socket is left")
	}
}

// TestGetStatusOfAnotherProgram has something else on the socket.
func TestGetStatusOfAnotherProgram(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", api.SocketPath(dir))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("hello")) })}
	go func() { _ = server.Serve(l) }()
	defer server.Close()
	if _, err := api.GetStatus(t.Context(), dir); err == nil || !strings.Contains(err.Error(), "decoding /status from "+api.SocketPath(dir)) {
		t.Error(err)
	}
}

func TestSetDrops(t *testing.T) {
	var d api.Datapath
	d.SetDrops(map[string]uint64{"b": 2, "a": 2, "none": 0, "most": 9})
	if want := []string{"a", "b", "most", "none"}; !reflect.DeepEqual(d.Reasons, want) {
		t.Errorf("reasons: %v", d.Reasons)
	}
	if want := []api.Drop{{Reason: "most", Packets: 9}, {Reason: "a", Packets: 2}, {Reason: "b", Packets: 2}}; !reflect.DeepEqual(d.Drops, want) {
		t.Errorf("drops: %v", d.Drops)
	}
}

func TestHistogram(t *testing.T) {
	h := api.NewHistogram(1, 2)
	for _, v := range []float64{0.5, 1, 1.5, 9} {
		h.Observe(v)
	}
	earlier := h.Clone()
	h.Observe(1)
	if want := []uint64{3, 1, 1}; !reflect.DeepEqual(h.Counts, want) || h.Sum != 13 {
		t.Errorf("%+v", h)
	}
	if want := []uint64{2, 1, 1}; !reflect.DeepEqual(earlier.Counts, want) {
		t.Errorf("the copy changed: %+v", earlier)
	}
}

// TestPublicOf checks that a subnet is behind the underlay address of its own family.
func TestPublicOf(t *testing.T) {
	p := api.Peer{
		Subnets:   []netip.Prefix{netip.MustParsePrefix("10.5.1.0/24"), netip.MustParsePrefix("fd00::/64")},
		PublicIPs: []netip.Addr{netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("192.0.2.1")},
	}
	if a, b := p.PublicOf(0), p.PublicOf(1); a != p.PublicIPs[1] || b != p.PublicIPs[0] {
		t.Error(a, b)
	}
	p.PublicIPs = p.PublicIPs[:1]
	if a := p.PublicOf(0); a.IsValid() {
		t.Error(a)
	}
}

func TestSortWarnings(t *testing.T) {
	a, b := api.Warning{Check: "a", Text: "x", Fix: "do"}, api.Warning{Check: "b", Text: "y"}
	if got := api.SortWarnings([]api.Warning{b, a, b}); !reflect.DeepEqual(got, []api.Warning{a, b}) {
		t.Error(got)
	}
	if a.String() != "x: do" || b.String() != "y" {
		t.Error(a, b)
	}
}

// TestRing checks that the ring keeps the last lines, whole ones, and not more than it
// should, and that it takes no memory for what is written after the first line.
func TestRing(t *testing.T) {
	var r api.Ring
	line := []byte(strings.Repeat("x", 99) + "\n")
	_, _ = r.Write(line)
	if got := r.Bytes(); string(got) != string(line) {
		t.Errorf("of one line it keeps %q", got)
	}
	if n := testing.AllocsPerRun(1, func() {
		for range 10000 {
			if n, err := r.Write(line); n != len(line) || err != nil {
				t.Fatal(n, err)
			}
		}
	}); n > 0 {
		t.Errorf("%v allocations for 10,000 lines", n)
	}
	_, _ = r.Write([]byte("the last\n"))
	got := r.Bytes()
	if n := len(got); n > 512<<10 || n < 512<<10-200 {
		t.Errorf("%d bytes are kept", n)
	}
	if text := string(got); !strings.HasPrefix(text, string(line)) || !strings.HasSuffix(text, "x\nthe last\n") {
		t.Errorf("it begins with %q and ends with %q", text[:20], text[len(text)-20:])
	}
}
