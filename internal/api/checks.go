package api

// Check is one condition that the running daemon, `culvert doctor` or both check for. The
// daemon's Warnings have its id. There is one list for both.
type Check struct {
	ID    string `json:"id"`
	Title string `json:"title"` // what is wrong if it is found
	// Risk says that packets still pass, until something else happens.
	Risk bool `json:"risk,omitempty"`
}

// Checks returns all conditions, causes before their consequences: this host, culvert's
// objects on it, other programs' rules, the store, the container runtime, other nodes.
func Checks() []Check {
	return []Check{
		{"privileges", "a capability is missing that culvert needs", false},
		{"kernel", "the kernel lacks something, or is too old", false},
		{"daemon", "no daemon answers, or it is not ready, or it rejected leases", false},
		{"fenced", "another node has the subnet that this node had", false},
		{"lease-expired", "the lease may have expired: no pod is added until it is renewed", false},
		{"clock", "nothing synchronises the clock, or it was set while the lease was valid", true},

		{"underlay-gone", "the underlay interface is gone", false},
		{"underlay-address-gone", "the host does not have the address that peers send to", false},
		{"underlay-route", "tunnel packets to a peer have no route", false},
		{"underlay-port", "the underlay interface is a port of a bridge or bond, but has the underlay's addresses", false},
		{"underlay-mtu", "the underlay's MTU leaves too little for pods", false},
		{"outer-source", "the tunnel device sends from another address than the published one", false},
		{"duplicate-address", "another machine on the link has this node's underlay address", false},
		{"port-taken", "another program has the tunnel's UDP port, or another device its VNI", false},
		{"leftovers", "devices of other overlays exist", true},
		{"network-manager", "systemd-networkd or NetworkManager may remove culvert's routes or devices", true},
		{"conntrack-full", "the connection tracking table is full, or nearly", false},
		{"neighbour-table", "a neighbour table is full, or nearly", false},

		{"forwarding-off", "the host, or a link of it, does not forward packets", false},
		{"reverse-path-filter", "strict reverse path filtering drops packets of peers", false},
		{"router-advertisements", "the IPv6 default route from router advertisements expires once the host forwards (accept_ra)", false},
		{"ipv6-off", "IPv6 is disabled on a device of culvert's", false},
		{"sysctl", "another kernel setting drops packets", false},
		{"host-link", "a device of culvert's is missing or misconfigured", false},
		{"host-address", "an address of a device of culvert's is missing, or superfluous", false},
		{"host-route", "routes of culvert's are missing, or wrong", false},
		{"host-neighbour", "neighbours on culvert's device are missing, or wrong", false},
		{"host-fdb", "FDB entries of culvert's device are missing, or wrong", false},
		{"host-nftables", "culvert's nftables table was changed", false},
		{"host-forward", "culvert's accept rules in other programs' chains are missing or misplaced", true},
		{"host-pods", "the pods' bridge is down, or lacks its address, its route or a pod's link", false},
		{"host-state", "the wanted state cannot be applied to the host", false},
		{"foreign-address", "another program's address is on a device of culvert's", false},
		{"foreign-route", "another program's route takes packets of the cluster network", false},
		{"policy-route", "a policy rule (ip rule) takes packets of the cluster network elsewhere", false},
		{"ipsec-block", "an IPsec policy drops packets of the cluster network", false},
		{"fast-path", "the fast path is configured, but off", true},

		{"forward-drop", "a rule drops packets of the cluster network", false},
		{"input-drop", "a rule drops the tunnel's packets on their way in", false},
		{"output-drop", "a rule drops the tunnel's packets on their way out", false},
		{"forward-unreadable", "other programs' rules cannot be read", true},

		{"store-latency", "the store cannot be reached, or is slow", false},
		{"store-in-network", "the address of a server that this node needs is in the cluster network", false},
		{"resolver-in-network", "the address of a resolver is in the cluster network", true},
		{"network-overlap", "a network of the host's overlaps the cluster network", true},
		{"network-nearly-full", "nearly all subnets are leased", true},
		{"subnet-file", "subnet.env is missing, stale, or cannot be written", false},

		{"cni", "no pod can be added", false},
		{"cni-conf", "the CNI configuration cannot be installed", false},
		{"cni-bridge", "the pods' bridge has addresses, or lacks something, that keeps pods from being added", false},
		{"cni-addresses", "the subnet has no address left for a pod", false},

		{"peer-off-link", "a peer is not on the underlay's link, and host-gw needs that", false},
		{"peer-unreachable", "a node does not answer through the tunnel", false},
		{"silent-peer", "this node sends to a peer and receives nothing from it", false},
		{"port-eaten", "the underlay drops the tunnel's UDP port", false},
		{"path-mtu", "packets of the pods' MTU do not pass", false},
		{"checksum-offload", "packets whose checksum is offloaded to hardware arrive damaged", false},
	}
}

// CheckOf returns the check with an id. If the list lacks it, only ID is set.
func CheckOf(id string) Check {
	for _, c := range Checks() {
		if c.ID == id {
			return c
		}
	}
	return Check{ID: id}
}
