package cni

import "net/netip"

// SubnetEnv is the content of subnet.env, the file through which a node
// daemon tells the CNI plugin what it leased. The format, and the order of
// its lines, are flannel's.
type SubnetEnv struct {
	// Networks are the cluster networks, and Gateways the first host address
	// of the leased subnet with the subnet's length (10.5.72.1/24); one entry
	// per family in use, IPv4 first.
	Networks []netip.Prefix
	Gateways []netip.Prefix
	MTU      int  // of pods' interfaces
	IPMasq   bool // the daemon masquerades, so the delegate must not
}
