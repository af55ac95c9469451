package lab

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/safchain/ethtool"
)

// Profile is a named set of offload settings of the underlay's links. With its
// defaults, veth passes GSO frames of 64 KB unsegmented, which no physical link does.
type Profile string

// The profiles.
const (
	// Offload enables everything that veth offers: GSO frames are never segmented.
	Offload Profile = "offload"
	// Cloud is like a cloud VM's NIC: it has segmentation offload (TSO, USO) and
	// checksum offload, but no segmentation offload for tunnelled packets.
	Cloud Profile = "cloud"
	// Plain has no segmentation offload, so the sender's stack segments; the
	// receiver coalesces (GRO).
	Plain Profile = "plain"
	// Bare is Plain without GRO.
	Bare Profile = "bare"
)

// Profiles returns all profiles, from the most to the fewest offloads.
func Profiles() []Profile { return []Profile{Offload, Cloud, Plain, Bare} }

// The names are ethtool's (ethtool -k, without the legacy aliases; kernel:
// net/ethtool/common.c, netdev_features_strings).
var (
	checksumFeatures = []string{"rx-checksum", "tx-checksum-ip-generic", "tx-scatter-gather"}
	tcpFeatures      = []string{
		"tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-tcp-ecn-segmentation",
		"tx-tcp-mangleid-segmentation", "tx-tcp-accecn-segmentation",
	}
	udpFeatures    = []string{"tx-udp-segmentation"}
	tunnelFeatures = []string{
		"tx-udp_tnl-segmentation", "tx-udp_tnl-csum-segmentation",
		"tx-gre-segmentation", "tx-gre-csum-segmentation",
		"tx-ipxip4-segmentation", "tx-ipxip6-segmentation",
	}
	otherFeatures = []string{"tx-generic-segmentation", "tx-gso-list", "tx-sctp-segmentation"}
	groFeatures   = []string{"rx-gro"}
)

// Features returns the features that the profile sets, by ethtool's names.
func (p Profile) Features() (map[string]bool, error) {
	set := map[string]bool{}
	put := func(on bool, lists ...[]string) {
		for _, name := range slices.Concat(lists...) {
			set[name] = on
		}
	}
	put(true, checksumFeatures, tcpFeatures, udpFeatures, tunnelFeatures, otherFeatures, groFeatures)
	switch p {
	case Offload:
	case Cloud:
		put(false, tunnelFeatures)
	case Plain:
		put(false, tcpFeatures, udpFeatures, tunnelFeatures, otherFeatures)
	case Bare:
		put(false, tcpFeatures, udpFeatures, tunnelFeatures, otherFeatures, groFeatures)
	default:
		return nil, fmt.Errorf("unknown underlay profile %q: use one of %q", string(p), Profiles())
	}
	return set, nil
}

// Offloads are a link's features, read back from the kernel.
type Offloads struct {
	Namespace, Link string
	Features        map[string]bool // all that the kernel knows
	Missing         []string        // the profile's features that the kernel does not know, or cannot change on this link
}

// SetProfile sets the features of all links of the underlay and returns them as read
// back: first the nodes' ends, then the bridge's ports, which never have GRO. It
// returns an error if a feature does not change; features that the kernel does not
// have are listed in Missing.
func (l *Lab) SetProfile(p Profile) ([]Offloads, error) {
	want, err := p.Features()
	if err != nil {
		return nil, err
	}
	var all []Offloads
	for _, n := range l.Nodes {
		o, err := n.setFeatures(n.Link, want)
		if err != nil {
			return nil, fmt.Errorf("underlay profile %s: %w", p, err)
		}
		all = append(all, o)
	}
	if l.options.Underlay != Bridged {
		return all, nil
	}
	// Nodes receive packets as the bridge forwards them, so its ports get the same
	// segmentation features. GRO there would coalesce packets before the node does.
	want = maps.Clone(want)
	for _, name := range groFeatures {
		want[name] = false
	}
	for _, n := range l.Nodes {
		o, err := l.Fabric.setFeatures(n.ID, want)
		if err != nil {
			return nil, fmt.Errorf("underlay profile %s: %w", p, err)
		}
		all = append(all, o)
	}
	return all, nil
}

func (n *Namespace) setFeatures(link string, want map[string]bool) (Offloads, error) {
	got := Offloads{Namespace: n.Name, Link: link}
	err := n.Do(func() error {
		e, err := ethtool.NewEthtool()
		if err != nil {
			return err
		}
		defer e.Close()
		known, err := e.FeaturesWithState(link)
		if err != nil {
			return err
		}
		set := map[string]bool{}
		for name, on := range want {
			if f, ok := known[name]; ok && (f.Available || f.Active == on) {
				set[name] = on
			} else {
				got.Missing = append(got.Missing, name)
			}
		}
		slices.Sort(got.Missing)
		if err := e.Change(link, set); err != nil {
			return err
		}
		if got.Features, err = e.Features(link); err != nil {
			return err
		}
		var refused []string
		for name, on := range set {
			if got.Features[name] != on {
				refused = append(refused, fmt.Sprintf("%s remains %t", name, !on))
			}
		}
		if len(refused) > 0 {
			slices.Sort(refused)
			return errors.New(strings.Join(refused, ", "))
		}
		return nil
	})
	if err != nil {
		return got, fmt.Errorf("offloads of %s in %s: %w", link, n.Name, err)
	}
	return got, nil
}
