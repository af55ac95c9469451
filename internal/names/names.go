// Package names has the names and numbers by which culvert's objects on a host are
// recognized: by the daemon that adopts them, by cleanup, and by the operator. It
// neither makes the objects nor looks for them: internal/host, internal/firewall and
// backend do. A name that changes here no longer finds what an older daemon made.
package names

import (
	"fmt"
	"strings"
)

// Devices. A name has at most 15 characters, and a VNI up to 8 digits.
const (
	TUN        = "culvert0"  // the userspace datapath's
	SuperFrame = "culvert0s" // its TAP device for frames that the uplink segments
	IPIP       = "cvt.ipip"  // the kernel datapath's
	// The veth pair whose far end coalesces the segments of bulk flows (GRO).
	JoinNear = "cvt.join0"
	JoinFar  = "cvt.join1"
	Probe    = "cvt.probe" // made and deleted to see whether the kernel can
)

// VXLAN returns the name of the kernel datapath's device for one family of pod
// addresses: cvt.<VNI> or cvt6.<VNI>.
func VXLAN(vni uint32, is4 bool) string {
	if is4 {
		return fmt.Sprintf("cvt.%d", vni)
	}
	return fmt.Sprintf("cvt6.%d", vni)
}

// Managed reports whether a device is one that internal/host configures: all of
// culvert's but SuperFrame, which the userspace datapath configures itself.
func Managed(device string) bool {
	switch device {
	case TUN, IPIP, JoinNear, JoinFar, Probe:
		return true
	}
	vni, ok := strings.CutPrefix(device, "cvt.")
	if !ok {
		vni, ok = strings.CutPrefix(device, "cvt6.")
	}
	return ok && vni != "" && strings.Trim(vni, "0123456789") == ""
}

// Ours reports whether a device is culvert's.
func Ours(device string) bool { return Managed(device) || device == SuperFrame }

// nftables.
const (
	Table      = "culvert"
	TableProbe = "culvert-probe"  // made and deleted to see whether the kernel can
	TableTrace = "culvert_trace_" // followed by the PID: marks packets for `culvert trace`
	// RuleComment marks culvert's rules in other programs' chains.
	RuleComment = "culvert"
)

// RouteProtocol marks culvert's routes (rtm_protocol in rtnetlink(7)).
const RouteProtocol = 67

// tc filters.
const (
	// FilterPrefix is how the names of all filters' programs begin.
	FilterPrefix = "culvert_"
	// PodFilterPrefix is how those of programs at pods' links begin.
	PodFilterPrefix = FilterPrefix + "pod_"
	// FilterPriority is the filters' priority (`tc filter ... pref`). It is after those
	// that the kernel assigns automatically, which count down from 49152, so that other
	// programs' filters run first.
	FilterPriority = 53248
)

// OwnerSocket is the abstract unix socket that is the lock of a network namespace.
const OwnerSocket = "@culvert-owner"
