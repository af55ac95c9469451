package etcd

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"culvert/subnet"

	"golang.org/x/sys/unix"
)

// The file is two lines of JSON: what it is, and the state.
//
//	{"culvert_snapshot":1,"sha256":"..."}
//	{"saved":"...","boot_id":"...", ... "leases":[{"key":"10.5.7.0-24","value":{...}}, ...]}
//
// It is of one machine's boot and never read by another, so that an older or
// newer one is ignored, not converted.

// keptVersion is changed whenever an older reader would misread the file.
const keptVersion = 1

// maxKept bounds what is read, in bytes: 5,000 leases take 2 MB.
const maxKept = 256 << 20

type keptHeader struct {
	Version int    `json:"culvert_snapshot"`
	SHA256  string `json:"sha256"` // of all that follows the first line
}

type keptFile struct {
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
	Lease    keptEntry     `json:"lease"` // our own
	Leases   []keptEntry   `json:"leases"`
}

// keptEntry is a key of etcd whose value is a lease.
type keptEntry struct {
	Key      string          `json:"key"`
	Value    json.RawMessage `json:"value"`
	Created  int64           `json:"created"`
	Modified int64           `json:"modified"`
	ID       int64           `json:"id,omitempty"`
}

func (e keptEntry) entry() subnet.Entry {
	return subnet.NewEntry(subnet.Entry{Key: e.Key, Value: e.Value, CreateRevision: e.Created, ModRevision: e.Modified, ID: e.ID})
}

// writeKept writes the state, unless the lease was lost or given back meanwhile.
func (r *Registry) writeKept(s keptState) error {
	// First, so that a process which is stopped here writes too early an end.
	at, err := readClocks()
	if err != nil {
		return err
	}
	f := keptFile{
		Saved: at.wall.UTC().Round(0), BootID: at.boot, SavedUp: at.up,
		Node: s.held.Node, Prefix: r.opts.Prefix, Endpoints: r.opts.Endpoints,
		Config: s.config, Cluster: s.cluster, Revision: s.at,
	}
	if s.held.ID != 0 {
		// By the shorter of the two: one stands still while the machine is
		// suspended, the other may have been set.
		now := time.Now()
		left := min(s.held.Expires.Sub(now), s.held.Expires.Round(0).Sub(now.Round(0)))
		f.Ends, f.EndsUp = f.Saved.Add(left), at.up+left
	}
	value, err := s.held.Value()
	if err != nil {
		return err
	}
	f.Lease = keptEntry{s.held.Key(), value, s.held.CreateRevision, s.held.ModRevision, s.held.ID}
	f.Leases = make([]keptEntry, 0, len(s.entries))
	for _, e := range s.entries {
		f.Leases = append(f.Leases, keptEntry{e.Key, e.Value, e.CreateRevision, e.ModRevision, e.ID})
	}
	text, err := f.marshal()
	if err != nil {
		return err
	}
	r.keeping.Lock()
	defer r.keeping.Unlock()
	if r.forgotten {
		return nil
	}
	return replaceFile(r.opts.SnapshotFile, text)
}

func (f keptFile) marshal() ([]byte, error) {
	body, err := json.Marshal(f)
	if err != nil {
		return nil, err
	}
	return withSum(append(body, '\n')), nil
}

// withSum puts the first line before the rest.
func withSum(body []byte) []byte {
	sum := sha256.Sum256(body)
	head, err := json.Marshal(keptHeader{keptVersion, hex.EncodeToString(sum[:])})
	if err != nil {
		panic("a number and a text cannot be written as JSON: " + err.Error())
	}
	return append(append(head, '\n'), body...)
}

// parseKept reads what marshal writes. All of it can be read and fits together,
// or there is an error; whether it still holds is another question.
func parseKept(text []byte) (*Kept, error) {
	head, body, found := bytes.Cut(text, []byte("\n"))
	var h keptHeader
	if !found || json.Unmarshal(head, &h) != nil || h.Version <= 0 {
		return nil, errors.New("it is no snapshot, or a part of one")
	}
	if h.Version != keptVersion {
		return nil, fmt.Errorf("it is of version %d, and this culvert reads %d", h.Version, keptVersion)
	}
	if sum := sha256.Sum256(body); hex.EncodeToString(sum[:]) != h.SHA256 {
		return nil, errors.New("it is damaged: its checksum is another")
	}
	var f keptFile
	if err := json.Unmarshal(body, &f); err != nil {
		return nil, fmt.Errorf("it cannot be read: %w", err)
	}
	for _, e := range f.Leases {
		if _, err := e.entry().Lease(); err != nil {
			return nil, fmt.Errorf("the lease %q in it cannot be read: %w", e.Key, err)
		}
	}
	l, err := f.Lease.entry().Lease()
	switch {
	case err != nil:
		return nil, fmt.Errorf("its own lease cannot be read: %w", err)
	case l.Reserved || l.Node == "" || l.Node != f.Node:
		return nil, fmt.Errorf("its lease %s is not the node %q's own", l, f.Node)
	case f.BootID == "" || f.Cluster == 0 || f.Revision <= 0 || l.ID != 0 && (f.Ends.IsZero() || f.EndsUp <= 0):
		return nil, errors.New("it says not when it holds")
	case len(f.Config.Networks) == 0:
		return nil, errors.New("it has no network configuration")
	}
	if err := f.Config.Admits(l); err != nil {
		return nil, fmt.Errorf("its lease does not fit its network configuration: %w", err)
	}
	return &Kept{Config: f.Config, Lease: l, Saved: f.Saved, file: f}, nil
}

// readBounded reads an ordinary file; another might never end.
func readBounded(name string) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxKept {
		return nil, fmt.Errorf("%s is not an ordinary file of at most %d bytes", name, maxKept)
	}
	return io.ReadAll(io.LimitReader(f, maxKept))
}
