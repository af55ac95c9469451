package tunnel

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// steer has the kernel choose the device's queue by the flow alone. Left to
// itself it moves a flow to the queue by which its answers come, which
// reorders packets at that moment.
//
// A flow is the addresses, and the ports with TCP: fragments have no ports, and
// those of UDP are to stay with their flow, which is why network cards do the
// same by default.
func steer(device int) error {
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "culvert_steer", Type: ebpf.SocketFilter, Instructions: steering(), License: "Apache-2.0",
	})
	if err != nil {
		return fmt.Errorf("loading the program that steers flows (needs CAP_BPF): %w", err)
	}
	fd := program.FD()
	err = unix.IoctlSetPointerInt(device, unix.TUNSETSTEERINGEBPF, fd)
	if err != nil {
		err = fmt.Errorf("TUNSETSTEERINGEBPF: %w", err)
	}
	return errors.Join(err, program.Close()) // the device keeps it
}

// steering returns a hash of the packet at the start of the buffer.
func steering() asm.Instructions {
	const buffer = -40 // in the stack frame: room for an IPv6 header
	load := func(offset, length int32) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Imm(asm.R2, offset),
			asm.Mov.Reg(asm.R3, asm.RFP),
			asm.Add.Imm(asm.R3, buffer),
			asm.Mov.Imm(asm.R4, length),
			asm.FnSkbLoadBytes.Call(),
			asm.JNE.Imm(asm.R0, 0, "done"),
		}
	}
	mix := func(offset int16) asm.Instructions { // R7 = R7 * 31 + word
		return asm.Instructions{
			asm.LoadMem(asm.R1, asm.RFP, buffer+offset, asm.Word),
			asm.Mul.Imm(asm.R7, 31),
			asm.Add.Reg(asm.R7, asm.R1),
		}
	}
	var p asm.Instructions
	add := func(more ...asm.Instruction) { p = append(p, more...) }
	add(asm.Mov.Reg(asm.R6, asm.R1), asm.Mov.Imm(asm.R7, 0))
	add(load(0, 20)...)
	add(
		asm.LoadMem(asm.R8, asm.RFP, buffer, asm.Byte), // version and header length
		asm.Mov.Reg(asm.R1, asm.R8),
		asm.RSh.Imm(asm.R1, 4),
		asm.JEq.Imm(asm.R1, 6, "ipv6"),
		asm.JNE.Imm(asm.R8, 0x45, "addresses4"), // with options: no ports
		asm.LoadMem(asm.R1, asm.RFP, buffer+9, asm.Byte),
		asm.JNE.Imm(asm.R1, unix.IPPROTO_TCP, "addresses4"),
		asm.LoadMem(asm.R1, asm.RFP, buffer+6, asm.Byte), // more fragments, and the offset
		asm.And.Imm(asm.R1, 0x3f),
		asm.JNE.Imm(asm.R1, 0, "addresses4"),
		asm.LoadMem(asm.R1, asm.RFP, buffer+7, asm.Byte),
		asm.JNE.Imm(asm.R1, 0, "addresses4"),
	)
	add(mix(12)...)
	add(mix(16)...)
	add(load(20, 4)...)
	add(mix(0)...)
	add(asm.Ja.Label("done"))

	four := mix(12)
	four[0] = four[0].WithSymbol("addresses4")
	add(four...)
	add(mix(16)...)
	add(asm.Ja.Label("done"))

	six := load(0, 40)
	six[0] = six[0].WithSymbol("ipv6")
	add(six...)
	for offset := int16(8); offset < 40; offset += 4 {
		add(mix(offset)...)
	}
	add(
		asm.LoadMem(asm.R1, asm.RFP, buffer+6, asm.Byte),
		asm.JNE.Imm(asm.R1, unix.IPPROTO_TCP, "done"),
	)
	add(load(40, 4)...)
	add(mix(0)...)

	add(
		// The low bits choose the queue: have the high ones decide, too.
		asm.Mov.Reg(asm.R0, asm.R7).WithSymbol("done"),
		asm.RSh.Imm32(asm.R0, 15),
		asm.Xor.Reg(asm.R0, asm.R7),
		asm.Mul.Imm32(asm.R0, 0x2c1b3c6d), // of lowbias32
		asm.RSh.Imm32(asm.R0, 16),
		asm.Return(),
	)
	return p
}
