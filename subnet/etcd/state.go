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

// state is the content of the state file. The lease ID identifies our lease even
// if its value does not.
type state struct {
	Node    string `json:"node"`
	LeaseID string `json:"lease_id"` // hexadecimal, as etcdctl shows it
}

// savedID returns the saved lease ID, or 0 if there is none or it is unreadable.
// The lease is then recognized only by identity and address.
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
		r.log.Warn("the state file cannot be read; recognizing our lease only by identity and address", "file", r.opts.StateFile, "error", err)
		return 0
	}
	return id
}

// saveID saves the lease ID before it is used, so that a crash does not lose it. A
// failure is only logged: a full disk must not cost us the lease. The caller holds
// keyLock.
func (r *Registry) saveID(node string, id int64) {
	if r.opts.StateFile == "" || r.writtenID == id {
		return
	}
	text, err := json.Marshal(state{Node: node, LeaseID: strconv.FormatInt(id, 16)})
	if err == nil {
		err = statefile.Write(r.opts.StateFile, append(text, '\n'), 0o600)
	}
	if err != nil {
		r.log.Warn("the state file cannot be written; a restart will recognize our lease only by identity and address", "file", r.opts.StateFile, "error", err)
		return
	}
	r.writtenID = id
}

func (r *Registry) dropID() error {
	r.writtenID = 0
	if r.opts.StateFile == "" {
		return nil
	}
	if err := os.Remove(r.opts.StateFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the state file: %w", err)
	}
	return nil
}
