package cni

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/types"
)

// NetConf is the plugin's network configuration, with flannel's keys. What is
// only handed on stays the raw text that the administrator wrote.
type NetConf struct {
	CNIVersion string `json:"cniVersion"`
	Name       string `json:"name"`
	// SubnetFile is the subnet.env that says which subnet is ours.
	SubnetFile string `json:"subnetFile"`
	// DataDir is where the plugin keeps what it delegated.
	DataDir string `json:"dataDir"`
	// RunDir is the run directory of the daemon that STATUS asks; the directory
	// of SubnetFile if empty.
	RunDir string `json:"runDir"`
	// GCEmptyMeansAll says that a GC whose list of valid attachments is empty
	// means it.
	GCEmptyMeansAll bool `json:"gcEmptyMeansAll"`
	// DelegateConf is the "delegate" key: the delegate's own settings.
	DelegateConf map[string]json.RawMessage `json:"delegate"`
	// IPAM is completed and becomes the delegate's.
	IPAM map[string]json.RawMessage `json:"ipam"`
	// RuntimeConfig is given by the runtime for declared capabilities.
	RuntimeConfig map[string]json.RawMessage `json:"runtimeConfig"`

	PrevResult       json.RawMessage `json:"prevResult"`
	ValidAttachments json.RawMessage `json:"cni.dev/valid-attachments"`
	// Attachments is what the specification called the list first.
	Attachments json.RawMessage `json:"cni.dev/attachments"`
}

// Defaults are the paths of a configuration that names none.
type Defaults struct {
	SubnetFile string
	DataDir    string
	RunDir     string // empty: the directory of SubnetFile
}

// DefaultsFor returns the paths for a plugin that was started by the name
// argv0: flannel's own for "flannel", so that a conflist of flannel's works
// unchanged, else culvert's.
func DefaultsFor(argv0 string) Defaults {
	if filepath.Base(argv0) == "flannel" {
		return Defaults{SubnetFile: "/run/flannel/subnet.env", DataDir: "/var/lib/cni/flannel", RunDir: "/run/culvert"}
	}
	return Defaults{SubnetFile: "/run/culvert/subnet.env", DataDir: "/var/lib/cni/culvert"}
}

// ParseNetConf reads the network configuration that the runtime gives on
// standard input. Its errors are CNI errors with the specification's codes.
func ParseNetConf(stdin []byte, d Defaults) (NetConf, error) {
	n := NetConf{SubnetFile: d.SubnetFile, DataDir: d.DataDir, RunDir: d.RunDir}
	if err := json.Unmarshal(stdin, &n); err != nil {
		return NetConf{}, types.NewError(types.ErrDecodingFailure, "reading the network configuration", err.Error())
	}
	for _, key := range []string{"name", "ipam"} {
		if _, ok := n.DelegateConf[key]; ok {
			return NetConf{}, invalid("\"delegate\" must not have the key %q: the plugin sets it (IPAM settings stand in \"ipam\" beside \"delegate\")", key)
		}
	}
	for _, p := range []struct{ key, path string }{{"subnetFile", n.SubnetFile}, {"dataDir", n.DataDir}, {"runDir", n.runDir()}} {
		if !filepath.IsAbs(p.path) {
			return NetConf{}, invalid("%q is %q, which is not an absolute path", p.key, p.path)
		}
	}
	if _, err := n.delegateType(); err != nil {
		return NetConf{}, err
	}
	if _, err := n.ipamType(); err != nil {
		return NetConf{}, err
	}
	return n, nil
}

func invalid(format string, args ...any) error {
	return types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf(format, args...), "")
}

// delegateType is the plugin that the verbs go to: bridge, unless told.
func (n NetConf) delegateType() (string, error) {
	return pluginName("delegate", n.DelegateConf, "bridge")
}

// ipamType is the address plugin: host-local, unless told.
func (n NetConf) ipamType() (string, error) {
	return pluginName("ipam", n.IPAM, "host-local")
}

// pluginName returns section's "type", which becomes a program's name in the
// directories of CNI_PATH and must not lead out of them.
func pluginName(section string, keys map[string]json.RawMessage, unset string) (string, error) {
	raw, ok := keys["type"]
	if !ok {
		return unset, nil
	}
	var name string
	if err := json.Unmarshal(raw, &name); err != nil || name == "" {
		return "", invalid("%q has a \"type\" that is not the name of a plugin: %.80s", section, raw)
	}
	if name != filepath.Base(name) || name == "." || name == ".." {
		return "", invalid("%q has the \"type\" %.80q: a plugin's name has no slashes and no dots alone", section, name)
	}
	return name, nil
}

// Delegate returns the configuration to give to the delegate, as flannel's
// plugin computes it (flannel_linux.go, doCmdAdd):
//
//   - name, cniVersion and runtimeConfig are the network's own;
//   - type bridge, isGateway true for a bridge, ipMasq the opposite of
//     FLANNEL_IPMASQ and mtu FLANNEL_MTU, each unless "delegate" says otherwise;
//   - ipam of type host-local unless told, whose ranges are the leased subnets
//     and whose routes are the configured ones and the cluster networks.
//
// Keys come out sorted. n is not changed.
func (n NetConf) Delegate(env SubnetEnv) ([]byte, error) {
	kind, err := n.delegateType()
	if err != nil {
		return nil, err
	}
	out := make(map[string]any, len(n.DelegateConf)+8)
	for k, v := range n.DelegateConf {
		out[k] = v
	}
	unless := func(key string, value any) {
		if _, ok := out[key]; !ok {
			out[key] = value
		}
	}
	out["name"] = n.Name
	out["type"] = kind
	unless("ipMasq", !env.IPMasq)
	unless("mtu", env.MTU)
	if kind == "bridge" {
		unless("isGateway", true)
	}
	if n.CNIVersion != "" {
		out["cniVersion"] = n.CNIVersion
	}
	if n.RuntimeConfig != nil {
		out["runtimeConfig"] = n.RuntimeConfig
	}
	if out["ipam"], err = n.delegateIPAM(env); err != nil {
		return nil, err
	}
	return json.Marshal(out)
}

func (n NetConf) delegateIPAM(env SubnetEnv) (map[string]any, error) {
	kind, err := n.ipamType()
	if err != nil {
		return nil, err
	}
	ipam := make(map[string]any, len(n.IPAM)+3)
	for k, v := range n.IPAM {
		ipam[k] = v
	}
	ipam["type"] = kind

	type addressRange struct {
		Subnet netip.Prefix `json:"subnet"`
	}
	var ranges [][]addressRange
	for _, s := range env.Subnets() {
		ranges = append(ranges, []addressRange{{s}})
	}
	ipam["ranges"] = ranges

	var routes []json.RawMessage
	if raw, ok := n.IPAM["routes"]; ok {
		if err := json.Unmarshal(raw, &routes); err != nil {
			return nil, invalid("\"ipam\" has \"routes\" that are not a list: %v", err)
		}
		var check []types.Route
		if err := json.Unmarshal(raw, &check); err != nil {
			return nil, invalid("\"ipam\" has \"routes\" that cannot be read: %v", err)
		}
	}
	for _, p := range env.Networks {
		dst, err := json.Marshal(map[string]netip.Prefix{"dst": p})
		if err != nil {
			return nil, err
		}
		routes = append(routes, dst)
	}
	ipam["routes"] = routes
	return ipam, nil
}

// with returns the configuration conf with further keys set, for the verbs
// that hand more to the delegate than ADD did. A key whose value is empty is
// left as it is.
func with(conf []byte, keys map[string]json.RawMessage) ([]byte, error) {
	var all map[string]json.RawMessage
	if err := json.Unmarshal(conf, &all); err != nil {
		return nil, err
	}
	for k, v := range keys {
		if len(v) > 0 && !bytes.Equal(v, []byte("null")) {
			all[k] = v
		}
	}
	return json.Marshal(all)
}
