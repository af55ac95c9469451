// Package cni is the border between a node's lease and its pods.
//
// The daemon writes subnet.env (SubnetEnv). The plugin, Plugin, reads it,
// turns the network configuration into one for a delegate such as bridge with
// host-local (NetConf.Delegate), and hands every verb to that delegate,
// keeping in a state directory what it delegated:
//
//	runtime --ADD--> culvert-cni --ADD--> bridge --ADD--> host-local
//	                  |      |
//	         subnet.env      dataDir/<container>:<interface>
//
// File formats, keys and results are those of flannel's CNI plugin
// (github.com/flannel-io/cni-plugin), so that a conflist moves over by
// changing its type.
package cni
