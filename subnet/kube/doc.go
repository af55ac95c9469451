// Package kube implements subnet.Registry on the Kubernetes API, in flannel's
// layout: a Node's spec.podCIDRs are its subnets, and annotations hold its
// addresses and backend data. Nodes running flannel and culvert can share a
// cluster.
//
//	net-conf.json (a mounted ConfigMap) ── Config
//	own Node:    spec.podCIDRs ── Acquire ── annotations, by a patch of nodes/status
//	other Nodes: metadata, by list and watch ── mirror ── Snapshot
//
// The API server owns the state; the mirror in memory and the snapshot file are
// copies. The package allocates nothing: the Node controller assigns each Node its
// podCIDRs once, and they are fixed until the Node is deleted. So a lease never
// expires. It is lost when our Node gets other podCIDRs, and in doubt while our
// Node does not exist.
//
// Only metadata is listed and watched (PartialObjectMetadata), a third of a Node's
// bytes. It lacks podCIDRs, so a culvert node repeats them in an annotation, with
// its Node's UID. Those of flannel's nodes are read once per UID, since the API
// server does not allow changing them.
//
// The client uses net/http and encoding/json, which the daemon links anyway;
// client-go would add 8 MB for one list, one watch, a GET and a PATCH.
package kube
