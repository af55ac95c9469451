package lab

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/safchain/ethtool"
)

// Profile is a named set of offloads of an underlay's links, since plain veth
// flatters the kernel: a packet of 64 KB crosses it in one piece, which no wire
// carries.
type Profile string

// The profiles, and what they stand for.
const (
	// Offload is everything that veth offers. Nothing is ever cut.
	Offload Profile = "offload"
	// Cloud is a cloud VM's network card: it cuts TCP and UDP itself and
	// completes checksums, and does neither inside tunnels.
	Cloud Profile = "cloud"
	// Plain cuts nothing, so the sender's stack does; the receiver joins (GRO).
	Plain Profile = "plain"
	// Bare is Plain without joining.
	Bare Profile = "bare"
)

// Profiles returns all of them, from the kindest to the harshest.
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

// Features returns what the profile sets, by ethtool's names.
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
		return nil, fmt.Errorf("underlay profile %q: there are %q", string(p), Profiles())
	}
	return set, nil
}

// Offloads are a link's features as they were read back.
type Offloads struct {
	Namespace, Link string
	Features        map[string]bool // every one that the kernel knows
	Missing         []string        // those of the profile that it does not know
}

// SetProfile sets the features of all links of the underlay and returns them
// as read back: first the nodes' ends, then those at the fabric's bridge,
// which never join packets. A feature that does not take its value is an
// error; one that this kernel does not know is listed.
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
	// What the bridge sends on to a node is what that node receives: a link
	// that can cut packets would hand them over uncut, and unjoined.
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
		known, err := e.FeatureNames(link)
		if err != nil {
			return err
		}
		set := map[string]bool{}
		for name, on := range want {
			if _, ok := known[name]; ok {
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
				refused = append(refused, fmt.Sprintf("%s stays %t", name, !on))
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
