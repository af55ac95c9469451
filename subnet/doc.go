// Package subnet defines the data model of the control plane: leases, the
// network configuration, snapshots of all leases, the subnet allocator, and
// Registry, the interface to the lease store. It parses, validates and decides;
// it does no I/O. It also has what the stores have in common, such as Pace, Backoff
// and Outage. The stores own the state: packages subnet/etcd and
// subnet/kube, and Memory for simulations and tests.
package subnet
