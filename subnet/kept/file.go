package kept

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"culvert/internal/boottime"
	"culvert/subnet"
)

// The file has two lines of JSON: a header and the state.
//
//	{"culvert_snapshot":1,"sha256":"..."}
//	{"saved":"...","boot_id":"...", ... "leases":[{"key":"10.5.7.0-24","value":{...}}, ...]}
//
// It is valid only for one boot of one machine, so a file of another version is
// ignored rather than converted.

// version must be incremented when an older reader would misread the file.
const version = 1

// maxSize is the largest file read, in bytes; 5,000 leases take 2 MB.
const maxSize = 256 << 20

type header struct {
	Version int    `json:"culvert_snapshot"`
	SHA256  string `json:"sha256"` // of everything after the first line
}

type file struct {
	Saved     time.Time     `json:"saved"`
	BootID    string        `json:"boot_id"`
	SavedUp   time.Duration `json:"saved_up"` // CLOCK_BOOTTIME, in nanoseconds
	Node      string        `json:"node"`
	Prefix    string        `json:"prefix"`
	Endpoints []string      `json:"endpoints"`
	// Ends and EndsUp are when the lease expires, by the wall clock and by
	// CLOCK_BOOTTIME.
	Ends     time.Time     `json:"ends,omitzero"`
	EndsUp   time.Duration `json:"ends_up,omitempty"`
	Config   subnet.Config `json:"config"`
	Cluster  uint64        `json:"cluster"`
	Revision int64         `json:"revision"`
	Lease    entry         `json:"lease"` // our own
	Leases   []entry       `json:"leases"`
}

// entry is a lease as stored.
type entry struct {
	Key      string          `json:"key"` // subnet.FormatKey
	Value    json.RawMessage `json:"value"`
	Created  int64           `json:"created"`
	Modified int64           `json:"modified"`
	ID       int64           `json:"id,omitempty"`
}

func (e entry) read() subnet.Entry {
	return subnet.NewEntry(subnet.Entry{Key: e.Key, Value: e.Value, CreateRevision: e.Created, ModRevision: e.Modified, ID: e.ID})
}

// marshal encodes the state as of the given moment.
func marshal(s State, at boottime.Moment) ([]byte, error) {
	f := file{
		Saved: at.Wall.UTC().Round(0), BootID: at.Boot, SavedUp: at.Up,
		Node: s.Node, Prefix: s.Prefix, Endpoints: s.Endpoints,
		Config: s.Config, Cluster: s.Cluster, Revision: s.Revision,
	}
	if s.Lease.ID != 0 {
		// Use the shorter of the two: the monotonic clock stands still during
		// suspend, and the wall clock may have been set.
		now := time.Now()
		left := min(s.Lease.Expires.Sub(now), s.Lease.Expires.Round(0).Sub(now.Round(0)))
		f.Ends, f.EndsUp = f.Saved.Add(left), at.Up+left
	}
	value, err := s.Lease.Value()
	if err != nil {
		return nil, err
	}
	f.Lease = entry{s.Lease.Key(), value, s.Lease.CreateRevision, s.Lease.ModRevision, s.Lease.ID}
	f.Leases = make([]entry, 0, len(s.Entries))
	for _, e := range s.Entries {
		f.Leases = append(f.Leases, entry{e.Key, e.Value, e.CreateRevision, e.ModRevision, e.ID})
	}
	return f.marshal()
}

func (f file) marshal() ([]byte, error) {
	body, err := json.Marshal(f)
	if err != nil {
		return nil, err
	}
	return withSum(append(body, '\n')), nil
}

// withSum prepends the header line.
func withSum(body []byte) []byte {
	sum := sha256.Sum256(body)
	head, err := json.Marshal(header{version, hex.EncodeToString(sum[:])})
	if err != nil {
		panic("encode the header: " + err.Error())
	}
	return append(append(head, '\n'), body...)
}

// parse is the inverse of marshal. It fails unless the whole file is valid and
// consistent; whether the lease is still valid is checked by expiry.
func parse(text []byte) (file, *State, error) {
	head, body, found := bytes.Cut(text, []byte("\n"))
	var h header
	if !found || json.Unmarshal(head, &h) != nil || h.Version <= 0 {
		return file{}, nil, errors.New("it is not a snapshot, or it is truncated")
	}
	if h.Version != version {
		return file{}, nil, fmt.Errorf("it has version %d, this culvert reads version %d", h.Version, version)
	}
	if sum := sha256.Sum256(body); hex.EncodeToString(sum[:]) != h.SHA256 {
		return file{}, nil, errors.New("it is damaged: the checksum does not match")
	}
	var f file
	if err := json.Unmarshal(body, &f); err != nil {
		return file{}, nil, fmt.Errorf("parse it: %w", err)
	}
	entries := make([]subnet.Entry, 0, len(f.Leases))
	for _, kept := range f.Leases {
		e := kept.read()
		if _, err := e.Lease(); err != nil {
			return file{}, nil, fmt.Errorf("parse its lease %q: %w", e.Key, err)
		}
		entries = append(entries, e)
	}
	l, err := f.Lease.read().Lease()
	switch {
	case err != nil:
		return file{}, nil, fmt.Errorf("parse the node's own lease: %w", err)
	case l.Reserved || l.Node == "" || l.Node != f.Node:
		return file{}, nil, fmt.Errorf("its lease %s does not belong to the node %q", l, f.Node)
	case f.BootID == "" || f.Cluster == 0 || f.Revision <= 0 || l.ID != 0 && (f.Ends.IsZero() || f.EndsUp <= 0):
		return file{}, nil, errors.New("it lacks the boot ID, cluster, revision or expiry")
	case len(f.Config.Networks) == 0:
		return file{}, nil, errors.New("it has no network configuration")
	}
	if err := f.Config.Admits(l); err != nil {
		return file{}, nil, fmt.Errorf("its lease does not fit its network configuration: %w", err)
	}
	return f, &State{
		Node: f.Node, Prefix: f.Prefix, Endpoints: f.Endpoints, Config: f.Config, Lease: l,
		Cluster: f.Cluster, Revision: f.Revision, Entries: entries, Saved: f.Saved,
	}, nil
}
