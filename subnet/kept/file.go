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

// The file is two lines of JSON: what it is, and the state.
//
//	{"culvert_snapshot":1,"sha256":"..."}
//	{"saved":"...","boot_id":"...", ... "leases":[{"key":"10.5.7.0-24","value":{...}}, ...]}
//
// It is of one machine's boot and never read by another, so that an older or
// newer one is ignored, not converted.

// version is changed whenever an older reader would misread the file.
const version = 1

// maxSize bounds what is read, in bytes: 5,000 leases take 2 MB.
const maxSize = 256 << 20

type header struct {
	Version int    `json:"culvert_snapshot"`
	SHA256  string `json:"sha256"` // of all that follows the first line
}

type file struct {
	Saved     time.Time     `json:"saved"`
	BootID    string        `json:"boot_id"`
	SavedUp   time.Duration `json:"saved_up"` // CLOCK_BOOTTIME, in nanoseconds
	Node      string        `json:"node"`
	Prefix    string        `json:"prefix"`
	Endpoints []string      `json:"endpoints"`
	// Ends and EndsUp are when the lease runs out, by the two clocks.
	Ends     time.Time     `json:"ends,omitzero"`
	EndsUp   time.Duration `json:"ends_up,omitempty"`
	Config   subnet.Config `json:"config"`
	Cluster  uint64        `json:"cluster"`
	Revision int64         `json:"revision"`
	Lease    entry         `json:"lease"` // our own
	Leases   []entry       `json:"leases"`
}

// entry is a key of etcd whose value is a lease.
type entry struct {
	Key      string          `json:"key"` // of its subnets (subnet.FormatKey)
	Value    json.RawMessage `json:"value"`
	Created  int64           `json:"created"`
	Modified int64           `json:"modified"`
	ID       int64           `json:"id,omitempty"`
}

func (e entry) read() subnet.Entry {
	return subnet.NewEntry(subnet.Entry{Key: e.Key, Value: e.Value, CreateRevision: e.Created, ModRevision: e.Modified, ID: e.ID})
}

// marshal says what is kept as of the instant.
func marshal(s State, at boottime.Moment) ([]byte, error) {
	f := file{
		Saved: at.Wall.UTC().Round(0), BootID: at.Boot, SavedUp: at.Up,
		Node: s.Node, Prefix: s.Prefix, Endpoints: s.Endpoints,
		Config: s.Config, Cluster: s.Cluster, Revision: s.Revision,
	}
	if s.Lease.ID != 0 {
		// By the shorter of the two: one stands still while the machine is
		// suspended, the other may have been set.
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

// withSum puts the first line before the rest.
func withSum(body []byte) []byte {
	sum := sha256.Sum256(body)
	head, err := json.Marshal(header{version, hex.EncodeToString(sum[:])})
	if err != nil {
		panic("a number and a text cannot be written as JSON: " + err.Error())
	}
	return append(append(head, '\n'), body...)
}

// parse reads what marshal writes. All of it can be read and fits together, or
// there is an error; whether it still holds is another question (believe).
func parse(text []byte) (file, *State, error) {
	head, body, found := bytes.Cut(text, []byte("\n"))
	var h header
	if !found || json.Unmarshal(head, &h) != nil || h.Version <= 0 {
		return file{}, nil, errors.New("it is no snapshot, or a part of one")
	}
	if h.Version != version {
		return file{}, nil, fmt.Errorf("it is of version %d, and this culvert reads %d", h.Version, version)
	}
	if sum := sha256.Sum256(body); hex.EncodeToString(sum[:]) != h.SHA256 {
		return file{}, nil, errors.New("it is damaged: its checksum is another")
	}
	var f file
	if err := json.Unmarshal(body, &f); err != nil {
		return file{}, nil, fmt.Errorf("it cannot be read: %w", err)
	}
	entries := make([]subnet.Entry, 0, len(f.Leases))
	for _, kept := range f.Leases {
		e := kept.read()
		if _, err := e.Lease(); err != nil {
			return file{}, nil, fmt.Errorf("the lease %q in it cannot be read: %w", e.Key, err)
		}
		entries = append(entries, e)
	}
	l, err := f.Lease.read().Lease()
	switch {
	case err != nil:
		return file{}, nil, fmt.Errorf("its own lease cannot be read: %w", err)
	case l.Reserved || l.Node == "" || l.Node != f.Node:
		return file{}, nil, fmt.Errorf("its lease %s is not the node %q's own", l, f.Node)
	case f.BootID == "" || f.Cluster == 0 || f.Revision <= 0 || l.ID != 0 && (f.Ends.IsZero() || f.EndsUp <= 0):
		return file{}, nil, errors.New("it says not when it holds")
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
