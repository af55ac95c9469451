package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/utils"
	"golang.org/x/sys/unix"

	"culvert/internal/statefile"
)

// Attachment is one interface of one container: the key of a record.
type Attachment struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifname"`
}

// maxContainerID leaves room for the interface name and the suffix of a temporary
// file within the 255 bytes of a file name.
const maxContainerID = 220

// validate rejects names that cannot be part of a file name. Neither name can
// contain a slash or a colon, and a container ID cannot begin with a dot.
func (a Attachment) validate() error {
	if err := utils.ValidateContainerID(a.ContainerID); err != nil {
		return err
	}
	if len(a.ContainerID) > maxContainerID {
		return types.NewError(types.ErrInvalidEnvironmentVariables,
			fmt.Sprintf("CNI_CONTAINERID has %d characters, more than %d", len(a.ContainerID), maxContainerID), "")
	}
	if err := utils.ValidateInterfaceName(a.IfName); err != nil {
		return err
	}
	return nil
}

// record describes an ADD. It is kept until its DEL succeeds.
type record struct {
	Attachment
	Network string `json:"network"`
	// Netns and Boot identify the network namespace of the ADD: its device and
	// inode, which the kernel reuses after a reboot, and the boot ID.
	Netns string `json:"netns"`
	Boot  string `json:"boot"`
	// NetnsPath is the path of the namespace.
	NetnsPath string `json:"netnsPath,omitempty"`
	// Delegate is the configuration passed to the delegate's ADD.
	Delegate json.RawMessage `json:"delegate"`
}

// netns returns the path of the namespace, if it is still that of the ADD.
func (r record) netns() string {
	if r.NetnsPath == "" || r.Boot != bootID() || netnsIdentity(r.NetnsPath) != r.Netns {
		return ""
	}
	return r.NetnsPath
}

// errDamaged means that a record exists but cannot be parsed.
var errDamaged = errors.New("the plugin's record is damaged")

// state is the directory of records, one file per attachment.
//
//	<container>:<interface>   ours
//	<container>               flannel's: only the delegate's configuration
type state struct{ dir string }

func (s state) path(a Attachment) string {
	return filepath.Join(s.dir, a.ContainerID+":"+a.IfName)
}

func (s state) flannelPath(a Attachment) string { return filepath.Join(s.dir, a.ContainerID) }

// save writes r durably, before the delegate is called.
func (s state) save(r record) error {
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return ioFailure("creating the state directory", err)
	}
	if err := statefile.Write(s.path(r.Attachment), text, 0o600); err != nil {
		return ioFailure("saving state", err)
	}
	return nil
}

// load returns the record of a. The error satisfies errors.Is(err, fs.ErrNotExist) if
// there is none, and errDamaged if it cannot be parsed. It also reads records of
// flannel's plugin, so that its pods can be deleted after a migration to culvert.
func (s state) load(a Attachment) (record, error) {
	text, err := os.ReadFile(s.path(a))
	if err == nil {
		var r record
		if err := json.Unmarshal(text, &r); err != nil {
			return record{}, fmt.Errorf("%w: %s: %w", errDamaged, s.path(a), err)
		}
		if r.Attachment != a || !isObject(r.Delegate) {
			return record{}, fmt.Errorf("%w: %s is not for container %s, interface %s", errDamaged, s.path(a), a.ContainerID, a.IfName)
		}
		return r, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return record{}, ioFailure("reading state", err)
	}

	text, err = os.ReadFile(s.flannelPath(a))
	if errors.Is(err, fs.ErrNotExist) {
		return record{}, fs.ErrNotExist
	}
	if err != nil {
		return record{}, ioFailure("reading state", err)
	}
	if !isObject(text) {
		return record{}, fmt.Errorf("%w: %s", errDamaged, s.flannelPath(a))
	}
	return record{Attachment: a, Delegate: text}, nil
}

// records returns the records of a network, except those saved after since. A record
// that cannot be parsed is kept, to be removed by its DEL, and reported on standard
// error.
func (s state) records(network string, since time.Time) ([]record, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, ioFailure("reading state", err)
	}
	var all []record
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		if info, err := e.Info(); err != nil || info.ModTime().After(since) {
			continue
		}
		a := Attachment{IfName: "eth0"} // flannel's record does not have the interface
		if id, ifname, ours := strings.Cut(e.Name(), ":"); ours {
			a.IfName, a.ContainerID = ifname, id
		} else {
			a.ContainerID = id
		}
		if a.validate() != nil {
			continue
		}
		r, err := s.load(a)
		if errors.Is(err, fs.ErrNotExist) {
			continue // deleted concurrently
		}
		if err == nil && r.Network == "" {
			var c struct {
				Name string `json:"name"`
			}
			err = json.Unmarshal(r.Delegate, &c)
			r.Network = c.Name
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "culvert-cni: keeping %s: %v\n", filepath.Join(s.dir, e.Name()), err)
			continue
		}
		if r.Network == network {
			all = append(all, r)
		}
	}
	return all, nil
}

// removeUnfinished removes the temporary files of ADDs that were killed while saving.
// The caller holds the exclusive lock: under a shared one, an ADD may be about to
// rename its file, however old that is.
func (s state) removeUnfinished() {
	for _, name := range s.unfinished() {
		_ = os.Remove(filepath.Join(s.dir, name))
	}
}

// removeOldUnfinished is removeUnfinished for an ADD, which holds the shared lock: with a
// runtime that never calls GC, nothing else removes the files. It keeps files of the last
// minute, and those whose attachment is locked: their ADD may still be in progress.
func (s state) removeOldUnfinished() {
	for _, name := range s.unfinished() {
		path := filepath.Join(s.dir, name)
		if info, err := os.Lstat(path); err != nil || time.Since(info.ModTime()) < time.Minute {
			continue
		}
		id, ifname, ok := strings.Cut(strings.TrimSuffix(strings.TrimPrefix(name, "."), ".tmp"), ":")
		a := Attachment{ContainerID: id, IfName: ifname}
		if !ok || a.validate() != nil {
			continue
		}
		l, err := s.takeAttachment(a, 0)
		if err != nil {
			continue
		}
		_ = os.Remove(path)
		l.release()
	}
}

// unfinished returns the names of the temporary files.
func (s state) unfinished() []string {
	entries, _ := os.ReadDir(s.dir)
	var all []string
	for _, e := range entries {
		if e.Type().IsRegular() && strings.HasPrefix(e.Name(), ".") && strings.HasSuffix(e.Name(), ".tmp") {
			all = append(all, e.Name())
		}
	}
	return all
}

func isObject(text []byte) bool {
	var o map[string]json.RawMessage
	return json.Unmarshal(text, &o) == nil && o != nil
}

// forget removes all records of a. It is not an error if there is none.
func (s state) forget(a Attachment) error {
	removed := false
	for _, p := range []string{s.path(a), statefile.Temporary(s.path(a)), s.flannelPath(a)} {
		switch err := os.Remove(p); {
		case err == nil:
			removed = true
		case !errors.Is(err, fs.ErrNotExist):
			return ioFailure("removing state", err)
		}
	}
	if !removed {
		return nil
	}
	if err := statefile.SyncDir(s.dir); err != nil {
		return ioFailure("removing state", err)
	}
	return nil
}

func ioFailure(doing string, err error) error {
	return types.NewError(types.ErrIOFailure, doing, err.Error())
}

// netnsIdentity identifies the namespace at path; unique within one boot. "" if there
// is no namespace.
func netnsIdentity(path string) string {
	var st unix.Stat_t
	if path == "" || !isNamespace(path) || unix.Stat(path, &st) != nil {
		return ""
	}
	return fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

// isNamespace reports whether path is a namespace, rather than missing or a regular
// file that is no longer mounted on.
func isNamespace(path string) bool {
	var fsstat unix.Statfs_t
	if unix.Statfs(path, &fsstat) != nil {
		return false
	}
	return fsstat.Type == unix.NSFS_MAGIC || fsstat.Type == unix.PROC_SUPER_MAGIC
}

// bootID returns the kernel's boot ID; "" if /proc does not have it.
func bootID() string {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(bytes.TrimSpace(text)))
}

// DefaultBridge is the bridge plugin's default bridge.
const DefaultBridge = "cni0"

// RecordedBridges returns the names of the pods' bridges: the default one, which
// remains after its last pod was deleted, with the gateway address of that pod's
// subnet, and those in the records of the given data directories. Unreadable records
// are skipped.
func RecordedBridges(dirs ...string) []string {
	names := []string{DefaultBridge}
	for _, d := range recordedDelegates(dirs) {
		if !slices.Contains(names, d.Bridge) {
			names = append(names, d.Bridge)
		}
	}
	return names
}

// GatewayBridges returns the names of the bridges, in the records of the given data
// directories, that are their pods' gateway.
func GatewayBridges(dirs ...string) []string {
	var names []string
	for _, d := range recordedDelegates(dirs) {
		if (d.IsGateway || d.IsDefaultGateway) && !slices.Contains(names, d.Bridge) {
			names = append(names, d.Bridge)
		}
	}
	return names
}

// recordedDelegate is a part of a record: the bridge plugin's configuration.
type recordedDelegate struct {
	Type, Bridge                string
	IsGateway, IsDefaultGateway bool
}

func recordedDelegates(dirs []string) []recordedDelegate {
	var all []recordedDelegate
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, e := range entries {
			text, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil || !e.Type().IsRegular() || strings.HasPrefix(e.Name(), ".") {
				continue
			}
			var r record
			delegate := json.RawMessage(text) // a record of flannel's plugin
			if strings.Contains(e.Name(), ":") {
				if json.Unmarshal(text, &r) != nil {
					continue
				}
				delegate = r.Delegate
			}
			d := recordedDelegate{Bridge: DefaultBridge}
			if json.Unmarshal(delegate, &d) == nil && d.Type == "bridge" && d.Bridge != "" {
				all = append(all, d)
			}
		}
	}
	return all
}
