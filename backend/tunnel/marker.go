package tunnel

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// From linux/bpf.h and linux/pkt_cls.h.
const (
	adjustRoomMAC       = 1      // BPF_ADJ_ROOM_MAC
	adjustRoomFixedGSO  = 1      // BPF_F_ADJ_ROOM_FIXED_GSO
	adjustRoomEncapIPv4 = 1 << 1 // BPF_F_ADJ_ROOM_ENCAP_L3_IPV4
	actShot             = 2      // TC_ACT_SHOT
)

// loadMarker loads the program that redirects IPIP frames to the uplink and marks their
// outer header as a tunnel's. The frames contain the outer header, but the skb's
// segmentation state does not. The program removes the header and adds it again with
// bpf_skb_adjust_room, which leaves the bytes unchanged and sets that state.
func loadMarker(uplink int) (*ebpf.Program, error) {
	const ethernet, outer, at = 14, 20, -24 // at: in the stack frame
	adjust := func(by int32, flags int32) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Imm(asm.R2, by),
			asm.Mov.Imm(asm.R3, adjustRoomMAC),
			asm.Mov.Imm(asm.R4, flags),
			asm.FnSkbAdjustRoom.Call(),
			asm.JNE.Imm(asm.R0, 0, "drop"),
		}
	}
	copyHeader := func(call asm.BuiltinFunc) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Imm(asm.R2, ethernet),
			asm.Mov.Reg(asm.R3, asm.RFP),
			asm.Add.Imm(asm.R3, at),
			asm.Mov.Imm(asm.R4, outer),
			asm.Mov.Imm(asm.R5, 0),
			call.Call(),
			asm.JNE.Imm(asm.R0, 0, "drop"),
		}
	}
	program := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}
	program = append(program, copyHeader(asm.FnSkbLoadBytes)...)
	program = append(program, adjust(-outer, adjustRoomFixedGSO)...)
	program = append(program, adjust(outer, adjustRoomFixedGSO|adjustRoomEncapIPv4)...)
	program = append(program, copyHeader(asm.FnSkbStoreBytes)...)
	program = append(
		program,
		asm.Mov.Imm(asm.R1, int32(uplink)),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRedirect.Call(),
		asm.Return(),
		asm.Mov.Imm(asm.R0, actShot).WithSymbol("drop"),
		asm.Return(),
	)
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "culvert_ipip", Type: ebpf.SchedCLS, Instructions: program, License: "Apache-2.0"})
	if err != nil {
		return nil, fmt.Errorf("loading the program that marks IPIP frames (needs CAP_BPF): %w", err)
	}
	return p, nil
}
