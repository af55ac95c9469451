package etcd

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"

	"culvert/internal/statefile"
)

// state is what is kept beside etcd: by the handle a daemon knows its lease
// even where the value does not show it.
type state struct {
	Node    string `json:"node"`
	LeaseID string `json:"lease_id"` // hexadecimal, as etcdctl shows it
}

// savedID returns zero where nothing is kept or it cannot be read: the lease is
// then known by identity and address alone.
func (r *Registry) savedID() int64 {
	if r.opts.StateFile == "" {
		return 0
	}
	text, err := statefile.Read(r.opts.StateFile, 64<<10)
	if errors.Is(err, fs.ErrNotExist) {
		return 0
	}
	var s state
	if err == nil {
		err = json.Unmarshal(text, &s)
	}
	var id int64
	if err == nil {
		id, err = strconv.ParseInt(s.LeaseID, 16, 64)
	}
	if err != nil {
		r.log.Warn("the kept lease handle cannot be read; going by identity and address", "file", r.opts.StateFile, "error", err)
		return 0
	}
	return id
}

// saveID keeps the handle before it is used, so that a crash in between loses
// nothing. It is an aid: a full disk must not cost us the lease. The caller has
// the turn.
func (r *Registry) saveID(node string, id int64) {
	if r.opts.StateFile == "" || r.kept == id {
		return
	}
	text, err := json.Marshal(state{Node: node, LeaseID: strconv.FormatInt(id, 16)})
	if err == nil {
		err = statefile.Write(r.opts.StateFile, append(text, '\n'), 0o600)
	}
	if err != nil {
		r.log.Warn("the lease handle cannot be kept; a restart goes by identity and address", "file", r.opts.StateFile, "error", err)
		return
	}
	r.kept = id
}

func (r *Registry) dropID() error {
	r.kept = 0
	if r.opts.StateFile == "" {
		return nil
	}
	if err := os.Remove(r.opts.StateFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget the lease handle: %w", err)
	}
	return nil
}
