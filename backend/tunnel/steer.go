package tunnel

import (
	"errors"
	"fmt"
	"os"
	"time"

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
//
// With sparse, there are two queues for each thread, and flows that send little have
// the first of them to themselves: a request does not wait behind all that a bulk
// stream has in the device.
//
// The moves count the flows that have become bulk, each before its first packet goes to
// the other queue (encap.Options); their page is the caller's to unmap.
func steer(device, threads int, sparse bool) (moves []byte, err error) {
	program := hashing()
	if sparse {
		flows, err := ebpf.NewMap(&ebpf.MapSpec{
			Name: "culvert_flows", Type: ebpf.Array, KeySize: 4, ValueSize: 24, MaxEntries: flowBuckets,
		})
		if err != nil {
			return nil, fmt.Errorf("making the map of flows (needs CAP_BPF): %w", err)
		}
		defer flows.Close() // the program keeps it
		count, err := ebpf.NewMap(&ebpf.MapSpec{
			Name: "culvert_moves", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1, Flags: unix.BPF_F_MMAPABLE,
		})
		if err != nil {
			return nil, fmt.Errorf("making the map of moves (needs CAP_BPF): %w", err)
		}
		defer count.Close() // the program keeps it, and so does the page
		if moves, err = unix.Mmap(count.FD(), 0, os.Getpagesize(), unix.PROT_READ, unix.MAP_SHARED); err != nil {
			return nil, fmt.Errorf("mapping the map of moves: %w", err)
		}
		program = append(program, sparseFirst(flows.FD(), count.FD(), threads)...)
	} else {
		program = append(program, asm.Mov.Reg(asm.R0, asm.R7), asm.Return())
	}
	defer func() {
		if err != nil && moves != nil {
			err, moves = errors.Join(err, unix.Munmap(moves)), nil
		}
	}()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "culvert_steer", Type: ebpf.SocketFilter, Instructions: program, License: "Apache-2.0",
	})
	if err != nil {
		return moves, fmt.Errorf("loading the program that steers flows (needs CAP_BPF): %w", err)
	}
	err = unix.IoctlSetPointerInt(device, unix.TUNSETSTEERINGEBPF, p.FD())
	if err != nil {
		err = fmt.Errorf("TUNSETSTEERINGEBPF: %w", err)
	}
	return moves, errors.Join(err, p.Close()) // the device keeps it
}

const (
	flowBuckets = 4096
	// A flow is bulk once it has sent bulkBytes in bulkWindow, and until it has sent
	// nothing for bulkPause: what it has left in its queue is gone by then, so that
	// nothing is overtaken when it moves back.
	bulkBytes  = 32 << 10
	bulkWindow = 10 * time.Millisecond
	bulkPause  = 100 * time.Millisecond
)

// sparseFirst chooses the queue by the hash in R7 and by what the flow has sent:
// hash % threads for a sparse one, and as many queues further for bulk. A flow's
// entry is when its window began, the bytes in it, and, of a bulk one, when it sent
// last, in ns. Two processors may write one at once; that costs precision alone, since
// a move is counted before it is written down.
func sparseFirst(flows, moves, threads int) asm.Instructions {
	const key = -48 // in the stack frame
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R7),
		asm.And.Imm(asm.R1, flowBuckets-1),
		asm.StoreMem(asm.RFP, key, asm.R1, asm.Word),
		asm.FnKtimeGetNs.Call(),
		asm.Mov.Reg(asm.R8, asm.R0),
		asm.LoadMapPtr(asm.R1, flows),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, key),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "sparse"),
		asm.Mov.Reg(asm.R9, asm.R0),

		// Bulk, and without a pause: it stays so.
		asm.LoadMem(asm.R1, asm.R9, 16, asm.DWord),
		asm.JEq.Imm(asm.R1, 0, "window"),
		asm.Mov.Reg(asm.R2, asm.R8),
		asm.Sub.Reg(asm.R2, asm.R1),
		asm.JSLE.Imm(asm.R2, int32(bulkPause), "bulk"),
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.R9, 16, asm.R1, asm.DWord),

		asm.LoadMem(asm.R1, asm.R9, 0, asm.DWord).WithSymbol("window"),
		asm.Mov.Reg(asm.R2, asm.R8),
		asm.Sub.Reg(asm.R2, asm.R1),
		asm.JSLE.Imm(asm.R2, int32(bulkWindow), "same window"),
		asm.StoreMem(asm.R9, 0, asm.R8, asm.DWord),
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.R9, 8, asm.R1, asm.DWord),

		asm.LoadMem(asm.R1, asm.R9, 8, asm.DWord).WithSymbol("same window"),
		asm.LoadMem(asm.R2, asm.R6, 0, asm.Word), // __sk_buff.len
		asm.Add.Reg(asm.R1, asm.R2),
		asm.StoreMem(asm.R9, 8, asm.R1, asm.DWord),
		asm.JLT.Imm(asm.R1, bulkBytes, "sparse"),

		asm.LoadMapValue(asm.R1, moves, 0),
		asm.Mov.Imm(asm.R2, 1),
		asm.AddAtomic.Mem(asm.R1, asm.R2, asm.DWord, 0),

		asm.StoreMem(asm.R9, 16, asm.R8, asm.DWord).WithSymbol("bulk"),
		asm.Mov.Reg(asm.R0, asm.R7),
		asm.Mod.Imm32(asm.R0, int32(threads)),
		asm.Add.Imm(asm.R0, int32(threads)),
		asm.Return(),

		asm.Mov.Reg(asm.R0, asm.R7).WithSymbol("sparse"),
		asm.Mod.Imm32(asm.R0, int32(threads)),
		asm.Return(),
	}
}

// hashing leaves a hash of the packet at the start of the buffer in R7, and the
// packet's context in R6.
func hashing() asm.Instructions {
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
		asm.Mov.Reg(asm.R7, asm.R0),
	)
	return p
}
