package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"path/filepath"

	"culvert/internal/host"
	"culvert/internal/statefile"
	"culvert/subnet/etcd"
	"culvert/subnet/kube"
)

// SavedOptions is the daemon's options as saved in its run directory, for `culvert doctor`,
// `trace` and `report` while no daemon runs. It holds no password, token or key.
type SavedOptions struct {
	Version         string         `json:"version"`
	Node            string         `json:"node"`
	SubnetFile      string         `json:"subnet_file"`
	Store           string         `json:"store"` // etcd or kubernetes
	Endpoints       []string       `json:"endpoints,omitempty"`
	Prefix          string         `json:"prefix"`
	NetConf         string         `json:"net_conf,omitempty"` // with Kubernetes
	Interfaces      []string       `json:"interfaces,omitempty"`
	Regexes         []string       `json:"interface_regexes,omitempty"`
	CanReach        netip.Addr     `json:"can_reach,omitzero"`
	PublicIPs       []netip.Addr   `json:"public_ips,omitempty"`
	IPMasq          bool           `json:"ip_masq"`
	NoMasq          []netip.Prefix `json:"no_masq,omitempty"`
	Datapath        Datapath       `json:"datapath"`
	FastPath        FastPath       `json:"fast_path"`
	TakeOverFlannel bool           `json:"take_over_flannel,omitempty"`
	Metrics         string         `json:"metrics,omitempty"`
}

func savedOptionsPath(runDir string) string { return filepath.Join(runDir, "told.json") }

// save saves this daemon's options.
func (o Options) save() error {
	s := o.describeStore()
	netConf := ""
	if o.Kubernetes != nil {
		netConf = o.Kubernetes.NetConf
	}
	text, err := json.MarshalIndent(SavedOptions{
		Version: o.Version, Node: o.Node, SubnetFile: o.SubnetFile, Store: s.Kind, Endpoints: o.servers().URLs, Prefix: s.Prefix, NetConf: netConf,
		Interfaces: o.Underlay.Interfaces, Regexes: o.Underlay.Regexes, CanReach: o.Underlay.CanReach, PublicIPs: o.PublicIPs,
		IPMasq: o.IPMasq, NoMasq: o.NoMasq, Datapath: o.Datapath, FastPath: o.FastPath, TakeOverFlannel: o.TakeOverFlannel, Metrics: o.Metrics,
	}, "", "  ")
	if err != nil {
		return err
	}
	return statefile.Write(savedOptionsPath(o.RunDir), append(text, '\n'), 0o644)
}

// LoadOptions returns the options that the last daemon saved in a run directory, nil if
// there are none.
func LoadOptions(runDir string) (*SavedOptions, error) {
	text, err := statefile.Read(savedOptionsPath(runDir), maxRecord)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var t SavedOptions
	if err := json.Unmarshal(text, &t); err != nil {
		return nil, fmt.Errorf("%s: %w", savedOptionsPath(runDir), err)
	}
	return &t, nil
}

// options converts back to Options. They lack the secrets to reach the store.
func (t SavedOptions) options(runDir string) Options {
	o := Options{
		Version: t.Version, Node: t.Node, RunDir: runDir, SubnetFile: t.SubnetFile,
		Etcd: etcd.Options{Endpoints: t.Endpoints, Prefix: t.Prefix, SnapshotFile: snapshotPath(runDir)},
		Underlay: host.UnderlaySelector{
			Interfaces: t.Interfaces, Regexes: t.Regexes, CanReach: t.CanReach, PublicIPs: t.PublicIPs,
		},
		PublicIPs: t.PublicIPs, IPMasq: t.IPMasq, NoMasq: t.NoMasq, Datapath: t.Datapath, FastPath: t.FastPath,
		TakeOverFlannel: t.TakeOverFlannel, Metrics: t.Metrics, Log: slog.New(slog.DiscardHandler),
	}
	if t.Store == "kubernetes" {
		o.Kubernetes = &kube.Options{Prefix: t.Prefix, NetConf: t.NetConf, SnapshotFile: snapshotPath(runDir)}
		if len(t.Endpoints) > 0 {
			o.Kubernetes.Server = t.Endpoints[0]
		}
	}
	return o
}

func snapshotPath(runDir string) string { return filepath.Join(runDir, "snapshot.json") }
