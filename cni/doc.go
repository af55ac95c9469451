// Package cni implements the CNI plugin and subnet.env, the file that the daemon
// hands the lease to the plugin in.
//
// The daemon writes subnet.env (SubnetEnv). The plugin (Plugin) reads it, derives
// the configuration of a delegate, such as bridge with host-local
// (NetConf.Delegate), and passes every verb on to the delegate:
//
//	runtime --ADD--> culvert-cni --ADD--> bridge --ADD--> host-local
//	                  |      |
//	         subnet.env      dataDir/<container>:<interface>
//
// The plugin owns the records in dataDir, one per attachment, and host-local the
// addresses. The plugin does not set up pods' interfaces itself, except to repair
// the bridge before an ADD.
//
// File formats, keys and results are those of flannel's CNI plugin
// (github.com/flannel-io/cni-plugin), so that migrating a conflist only requires
// changing its type.
package cni
