// Package kube is the lease registry on the Kubernetes API, in flannel's layout:
// a Node's spec.podCIDRs are its subnets, and annotations of the Node say where
// it is reached and how. flannel's nodes and culvert's live in one cluster.
//
//	net-conf.json (a mounted ConfigMap) ── Config
//	own Node:    spec.podCIDRs ── Acquire ── annotations, by a patch of nodes/status
//	other Nodes: metadata, by list and watch ── mirror ── Snapshot
//
// Nobody leases here: the Node controller gives each Node its podCIDRs, once, and
// they are its own until the Node is deleted. So a lease never expires; it is
// lost when our Node has other podCIDRs, and in doubt while there is no Node.
//
// What is asked for: metadata alone (PartialObjectMetadata), a third of a Node's
// bytes. Metadata lacks podCIDRs. A culvert node therefore repeats its own in an
// annotation, with its Node's UID; those of other nodes, which flannel runs on,
// are read once for each UID, since the API server lets nobody change them.
//
// The client is net/http and encoding/json: the daemon links both anyway, and
// client-go would add 8 MB to it for one list, one watch, a GET and a PATCH.
package kube
