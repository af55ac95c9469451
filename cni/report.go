package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Report is the state of the plugin's installation on a host.
type Report struct {
	// Config is the path of the network configuration list, and Problem what is
	// wrong with it. If Problem is set, only Rivals, Programs and NotReady are
	// filled in.
	Config  string   `json:"config"`
	Problem string   `json:"problem,omitempty"`
	Rivals  []string `json:"rivals,omitempty"` // configurations that take precedence
	// Programs are the plugin and the plugins that the configuration uses.
	Programs []Program `json:"programs"`

	SubnetFile string         `json:"subnet_file"`
	Subnets    []netip.Prefix `json:"subnets"`
	Expires    time.Time      `json:"expires,omitzero"`
	// Ready reports whether a pod can be added; if not, NotReady says why, as STATUS
	// does.
	Ready    bool   `json:"ready"`
	NotReady string `json:"not_ready,omitempty"`

	// Problems are what would keep an ADD from succeeding on this host, whether a daemon
	// runs or not.
	Problems []Problem `json:"flaws,omitempty"`

	Attachments int `json:"attachments"` // recorded by the plugin
	Addresses   int `json:"addresses"`   // reserved by host-local
}

// Program is a plugin's executable.
type Program struct {
	Name    string `json:"name"`
	Path    string `json:"path"`
	Problem string `json:"problem,omitempty"`
}

// Status checks the installation and queries the daemon.
func (i Install) Status(ctx context.Context) Report {
	r := Report{Config: filepath.Join(i.ConfDir, i.ConfName), Subnets: []netip.Prefix{}}
	r.Rivals, _ = i.rivals() // an unreadable directory is reported as Problem
	n, chained, err := readConflist(r.Config)
	if err != nil {
		r.Programs = i.programs([]string{PluginName})
		r.Problem = err.Error()
		r.NotReady = r.Problem
		return r
	}
	delegate, _ := n.delegateType() // validated by ParseNetConf
	ipam, _ := n.ipamType()
	r.Programs = i.programs(append([]string{PluginName, delegate, ipam}, chained...))
	r.SubnetFile = n.SubnetFile
	if env, err := ReadSubnetEnv(n.SubnetFile); err == nil {
		r.Subnets, r.Expires = env.Subnets(), env.Expires
	}
	r.Problems = n.examine()
	r.Attachments = count(n.DataDir, func(name string) bool { return !strings.HasPrefix(name, ".") })
	if store, ok, err := n.addressStore(); err == nil && ok {
		r.Addresses = count(store.dir, func(name string) bool { _, err := netip.ParseAddr(name); return err == nil })
	}
	for _, p := range r.Programs {
		if p.Problem != "" {
			r.NotReady = p.Path + ": " + p.Problem
			return r
		}
	}
	if _, err := n.ready(ctx); err != nil {
		r.NotReady = unavailable(err).Error()
		return r
	}
	r.Ready = true
	return r
}

// readConflist returns the plugin's part of a configuration list, and the types of
// the other plugins in it.
func readConflist(path string) (n NetConf, chained []string, err error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return n, nil, fmt.Errorf("%s does not exist: run `culvert cni install`", path)
	}
	if err != nil {
		return n, nil, err
	}
	var list struct {
		Name    string            `json:"name"`
		Plugins []json.RawMessage `json:"plugins"`
	}
	if err := json.Unmarshal(text, &list); err != nil {
		return n, nil, fmt.Errorf("%s: %w", path, err)
	}
	found := false
	for _, raw := range list.Plugins {
		var p struct {
			Type string `json:"type"`
		}
		if err := json.Unmarshal(raw, &p); err != nil {
			return n, nil, fmt.Errorf("%s: %w", path, err)
		}
		if p.Type != PluginName {
			chained = append(chained, p.Type)
			continue
		}
		found = true
		if n, err = ParseNetConf(raw, DefaultsFor(PluginName)); err != nil {
			return n, nil, fmt.Errorf("%s: %w", path, err)
		}
		n.Name = list.Name
	}
	if !found {
		return n, nil, fmt.Errorf("%s has no plugin of type %s", path, PluginName)
	}
	return n, chained, nil
}

// programs checks whether the runtime would find each plugin.
func (i Install) programs(names []string) []Program {
	var all []Program
	for _, name := range names {
		p := Program{Name: name, Path: filepath.Join(i.BinDir, name)}
		switch info, err := os.Stat(p.Path); {
		case errors.Is(err, fs.ErrNotExist):
			p.Problem = "it does not exist: run `culvert cni install`"
		case err != nil:
			p.Problem = err.Error()
		case !info.Mode().IsRegular() || info.Mode().Perm()&0o111 == 0:
			p.Problem = "it is not executable"
		}
		all = append(all, p)
	}
	return all
}

func count(dir string, is func(name string) bool) int {
	entries, _ := os.ReadDir(dir) // no directory yet: 0
	k := 0
	for _, e := range entries {
		if is(e.Name()) {
			k++
		}
	}
	return k
}
