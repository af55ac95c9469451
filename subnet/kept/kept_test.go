package kept

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"culvert/internal/boottime"
	"culvert/internal/fuzzloop"
	"culvert/subnet"
)

// A lease is accepted only while it certainly has not expired, whatever happened
// to the clocks.
func TestSnapshotExpiry(t *testing.T) {
	t.Parallel()
	f, s, err := parse(example(t))
	if err != nil {
		t.Fatal(err)
	}
	saved := boottime.Moment{Boot: f.BootID, Up: f.SavedUp, Wall: f.Saved}
	for _, c := range []struct {
		name     string
		boot     string
		up, wall time.Duration // elapsed since the file was written
		left     time.Duration // 0: rejected
	}{
		{name: "immediately", left: time.Hour},
		{name: "later", up: 20 * time.Minute, wall: 20 * time.Minute, left: 40 * time.Minute},
		{name: "at the end", up: time.Hour, wall: time.Hour},
		{name: "the wall clock stepped back", up: 50 * time.Minute, wall: -24 * time.Hour, left: 10 * time.Minute},
		{name: "the wall clock stepped back, after expiry", up: 61 * time.Minute, wall: -24 * time.Hour},
		{name: "the wall clock stepped forward", up: time.Minute, wall: 2 * time.Hour},
		{name: "the machine was restored", wall: 2 * time.Hour},
		{name: "before it was saved", up: -time.Second},
		{name: "another boot", boot: "another", up: time.Minute, wall: time.Minute},
	} {
		now := boottime.Moment{Boot: f.BootID + c.boot, Up: saved.Up + c.up, Wall: saved.Wall.Add(c.wall)}
		ends, err := f.expiry(s.Lease, now)
		if left := ends.Sub(now.Wall); (err == nil) != (c.left > 0) || err == nil && left != c.left {
			t.Errorf("%s: %v left, %v", c.name, left, err)
		}
	}
}

// example returns a file with a lease that lasts an hour.
func example(t testing.TB) []byte {
	t.Helper()
	cfg, _, err := subnet.ParseConfig([]byte(`{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}`))
	if err != nil {
		t.Fatal(err)
	}
	saved := time.Date(2026, 1, 2, 15, 0, 0, 0, time.UTC)
	own := `{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"},"NodeID":"node-1"}`
	peer := `{"PublicIP":"198.51.100.8","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:01:08"}}`
	text, err := file{
		Saved: saved, BootID: "boot", SavedUp: time.Hour, Node: "node-1", Prefix: "/coreos.com/network", Endpoints: []string{"http://192.0.2.9:2379"},
		Ends: saved.Add(time.Hour), EndsUp: 2 * time.Hour, Config: cfg, Cluster: 7, Revision: 9,
		Lease:  entry{"10.5.7.0-24", []byte(own), 3, 4, 5},
		Leases: []entry{{"10.5.7.0-24", []byte(own), 3, 4, 5}, {"10.5.8.0-24", []byte(peer), 6, 6, 7}},
	}.marshal()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// A file that is truncated, damaged in any byte, or of another version is
// rejected.
func TestDamagedFileIsRejected(t *testing.T) {
	t.Parallel()
	text := example(t)
	for n := range text {
		if _, k, err := parse(text[:n]); err == nil {
			t.Fatalf("the first %d of %d bytes were accepted as %+v", n, len(text), k)
		}
		spoilt := bytes.Clone(text)
		spoilt[n] ^= 1
		if _, k, err := parse(spoilt); err == nil && n > bytes.IndexByte(text, '\n') {
			t.Fatalf("with byte %d changed it was accepted as %+v", n, k)
		}
	}
	newer := bytes.Replace(text, []byte(`"culvert_snapshot":1`), []byte(`"culvert_snapshot":2`), 1)
	if _, _, err := parse(newer); err == nil || !strings.Contains(err.Error(), "version 2") {
		t.Errorf("a newer version: %v", err)
	}
}

// FuzzParse parses arbitrary content; what is accepted must survive a round trip.
func FuzzParse(std *testing.F) {
	f := fuzzloop.Of(std)
	text := example(f)
	_, body, _ := strings.Cut(string(text), "\n")
	f.Add([]byte(body))
	f.Fuzz(func(t *testing.T, body []byte) {
		_, _, _ = parse(body) // with an arbitrary header
		got, k, err := parse(withSum(body))
		if err != nil {
			return
		}
		text, err := got.marshal()
		if err != nil {
			t.Fatal(err)
		}
		againFile, again, err := parse(text)
		if err != nil || again.Lease.String() != k.Lease.String() || len(again.Entries) != len(k.Entries) || againFile.EndsUp != got.EndsUp {
			t.Errorf("%+v became %+v, %v", k, again, err)
		}
	})
}
