// Package subnet is about who owns which part of the cluster network: the
// lease, the network configuration, the snapshot of all leases, the allocator
// (pure arithmetic), and the Registry through which nodes agree.
//
// Everything here is free of input and output; package subnet/etcd is the
// Registry on etcd.
package subnet
