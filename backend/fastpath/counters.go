package fastpath

import (
	"cmp"
	"slices"

	"culvert/internal/api"
)

// counter is an index of the map "counters": enum counter in bpf/fastpath.c.
type counter uint32

const (
	outPackets counter = iota // each segment counted
	outBytes                  // of inner packets
	outFrames
	inPackets
	inBytes
	inFrames
	inJoined // of inFrames: through the veth pair, for GRO
	outShort // of outFrames: the short way from pod to pod
	inShort  // of inFrames

	slowOutPeer
	slowOutProtocol
	slowOutLength
	slowOutChecksum
	slowOutSegments
	slowOutHash
	slowOutRoom
	slowOutFlow

	slowInOptions
	slowInFragment
	slowInLength
	slowInHeader
	slowInSource
	slowInDestination
	slowInECN
	slowInChecksum
	slowInSegments
	slowInFlow
	slowInRoom

	counters // number of counters
)

// slowNames are the reasons for leaving a packet to the kernel datapath, which carries
// or drops it.
var slowNames = [counters]string{
	slowOutPeer:       "egress-no-peer",
	slowOutProtocol:   "egress-protocol",
	slowOutLength:     "egress-too-long",
	slowOutChecksum:   "egress-checksum",
	slowOutSegments:   "egress-segments",
	slowOutHash:       "egress-no-flow",
	slowOutRoom:       "egress-no-room",
	slowOutFlow:       "egress-flow",
	slowInOptions:     "ingress-options",
	slowInFragment:    "ingress-fragment",
	slowInLength:      "ingress-length",
	slowInHeader:      "ingress-header",
	slowInSource:      "ingress-source",
	slowInDestination: "ingress-not-ours",
	slowInECN:         "ingress-ecn",
	slowInChecksum:    "ingress-checksum",
	slowInSegments:    "ingress-segments",
	slowInFlow:        "ingress-flow",
	slowInRoom:        "ingress-no-room",
}

// readings are the counters, summed over all CPUs.
type readings [counters]uint64

func (r readings) egress() api.Traffic {
	return api.Traffic{Packets: r[outPackets], Bytes: r[outBytes], Frames: r[outFrames]}
}

func (r readings) ingress() api.Traffic {
	return api.Traffic{Packets: r[inPackets], Bytes: r[inBytes], Frames: r[inFrames]}
}

// slow returns how many packets were left to the kernel datapath, by reason, the most
// frequent first.
func (r readings) slow() []api.Drop {
	var all []api.Drop
	for c, name := range slowNames {
		if name != "" && r[c] != 0 {
			all = append(all, api.Drop{Reason: name, Packets: r[c]})
		}
	}
	slices.SortFunc(all, func(a, b api.Drop) int {
		return cmp.Or(cmp.Compare(b.Packets, a.Packets), cmp.Compare(a.Reason, b.Reason))
	})
	return all
}
