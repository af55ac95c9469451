package cni

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/types"
)

// NetConf is the plugin's network configuration, with flannel's keys. What is only
// passed on is kept as raw JSON.
type NetConf struct {
	CNIVersion string `json:"cniVersion"`
	Name       string `json:"name"`
	// SubnetFile is the path of subnet.env.
	SubnetFile string `json:"subnetFile"`
	// DataDir is the directory of the plugin's records.
	DataDir string `json:"dataDir"`
	// RunDir is the run directory of the daemon that STATUS queries; default: the
	// directory of SubnetFile.
	RunDir string `json:"runDir"`
	// GCEmptyMeansAll makes a GC with an empty list of valid attachments release
	// everything.
	GCEmptyMeansAll bool `json:"gcEmptyMeansAll"`
	// DelegateConf is the "delegate" key: the delegate's own settings.
	DelegateConf map[string]json.RawMessage `json:"delegate"`
	// IPAM is completed and passed to the delegate.
	IPAM map[string]json.RawMessage `json:"ipam"`
	// RuntimeConfig is set by the runtime for declared capabilities.
	RuntimeConfig map[string]json.RawMessage `json:"runtimeConfig"`

	PrevResult       json.RawMessage `json:"prevResult"`
	ValidAttachments json.RawMessage `json:"cni.dev/valid-attachments"`
	// Attachments is an earlier name of the key in the specification.
	Attachments json.RawMessage `json:"cni.dev/attachments"`
}

// Defaults are the paths used if the configuration does not set them.
type Defaults struct {
	SubnetFile string
	DataDir    string
	RunDir     string // empty: the directory of SubnetFile
}

// DefaultsFor returns the default paths for the program name argv0: flannel's for
// "flannel", so that flannel's conflist works unchanged, else culvert's.
func DefaultsFor(argv0 string) Defaults {
	if filepath.Base(argv0) == "flannel" {
		return Defaults{SubnetFile: "/run/flannel/subnet.env", DataDir: "/var/lib/cni/flannel", RunDir: "/run/culvert"}
	}
	return Defaults{SubnetFile: "/run/culvert/subnet.env", DataDir: "/var/lib/cni/culvert"}
}

// ParseNetConf parses the network configuration that the runtime passes on standard
// input. Its errors are CNI errors with the specification's codes.
func ParseNetConf(stdin []byte, d Defaults) (NetConf, error) {
	n := NetConf{SubnetFile: d.SubnetFile, DataDir: d.DataDir, RunDir: d.RunDir}
	if err := json.Unmarshal(stdin, &n); err != nil {
		return NetConf{}, types.NewError(types.ErrDecodingFailure, "reading the network configuration", err.Error())
	}
	for _, key := range []string{"name", "ipam"} {
		if _, ok := n.DelegateConf[key]; ok {
			return NetConf{}, invalid("\"delegate\" must not have the key %q: the plugin sets it (IPAM settings belong in \"ipam\", next to \"delegate\")", key)
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

// delegateType returns the plugin that the verbs are passed to; default bridge.
func (n NetConf) delegateType() (string, error) {
	return pluginName("delegate", n.DelegateConf, "bridge")
}

// ipamType returns the IPAM plugin; default host-local.
func (n NetConf) ipamType() (string, error) {
	return pluginName("ipam", n.IPAM, "host-local")
}

// pluginName returns the "type" of a section. It is used as a file name in the
// directories of CNI_PATH and must not leave them.
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
		return "", invalid("%q has the \"type\" %.80q: a plugin's name has no slashes and is not . or ..", section, name)
	}
	return name, nil
}

// Delegate returns the delegate's configuration, computed as by flannel's plugin
// (flannel_linux.go, doCmdAdd):
//
//   - name, cniVersion and runtimeConfig are those of the network;
//   - type bridge, isGateway true for a bridge, ipMasq the opposite of
//     FLANNEL_IPMASQ and mtu FLANNEL_MTU, each unless set in "delegate";
//   - ipam of type host-local unless set, with the leased subnets as ranges, and as
//     routes the configured ones and the cluster networks.
//
// Keys are sorted. Delegate does not modify n.
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
			return nil, invalid("\"routes\" in \"ipam\" is not a list: %v", err)
		}
		var check []types.Route
		if err := json.Unmarshal(raw, &check); err != nil {
			return nil, invalid("\"routes\" in \"ipam\" is invalid: %v", err)
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

// with returns the configuration conf with additional keys set, for verbs that pass
// more to the delegate than ADD does. It skips keys with an empty value.
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
