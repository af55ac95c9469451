package subnet

import "net/netip"

// Config is the network configuration, shared by all nodes through the store.
// Its JSON form is flannel's (ParseConfig).
type Config struct {
	// Networks holds one entry per enabled address family, IPv4 first.
	Networks []Network
	Backend  BackendConfig
	// EnableNFTables is flannel's key; culvert always uses nftables.
	EnableNFTables bool
}

// Network is the cluster network of one address family and how it is divided
// into node subnets.
type Network struct {
	Prefix    netip.Prefix // the whole cluster network, such as 10.5.0.0/16
	SubnetLen int          // prefix length of a node's subnet, such as 24
	SubnetMin netip.Addr   // first subnet that may be leased
	SubnetMax netip.Addr   // last subnet that may be leased
}

// BackendConfig names the wire format and its options. ParseConfig leaves
// options that do not apply to the format at zero.
type BackendConfig struct {
	Type          string // "vxlan", "ipip", "host-gw"
	VNI           uint32
	Port          uint16 // UDP; default 8472, as in the Linux kernel and flannel
	MTU           int    // 0: derive from the underlay
	GBP           bool
	Learning      bool
	DirectRouting bool
}
