package tunnel

import (
	"errors"
	"fmt"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"culvert/encap"
)

// steer loads an eBPF program that selects the device's queue by flow. By default
// the kernel moves a flow to the queue to which its replies were written, which reorders
// packets at that moment.
//
// A flow is the addresses, and with TCP the ports. UDP ports are not used, since
// fragments do not have them and must stay in order; network cards do the same by
// default.
//
// With sparse, each thread has lanesFor(threads) queues. The first is for flows that send
// little: a request does not wait behind a bulk stream's queued packets. The others are
// for bulk flows, by protocol and source address: what a pod's flood does not leave room
// for are the flood's own packets.
//
// page is a mapped encap.Steering, which the program shares with the loop. The caller
// unmaps it, and closes the program.
func steer(threads int, sparse bool) (p *ebpf.Program, page []byte, err error) {
	lanes := lanesFor(threads)
	program := hashing(lanes)
	if sparse {
		flows, err := ebpf.NewMap(&ebpf.MapSpec{
			Name: "culvert_flows", Type: ebpf.Array, KeySize: 4, ValueSize: flowSize, MaxEntries: flowBuckets,
		})
		if err != nil {
			return nil, nil, fmt.Errorf("making the map of flows (needs CAP_BPF): %w", err)
		}
		defer flows.Close() // the program keeps it
		shared, err := ebpf.NewMap(&ebpf.MapSpec{
			Name: "culvert_steer", Type: ebpf.Array, KeySize: 4, ValueSize: uint32(steeringSize), MaxEntries: 1, Flags: unix.BPF_F_MMAPABLE,
		})
		if err != nil {
			return nil, nil, fmt.Errorf("making the map that the loop shares (needs CAP_BPF): %w", err)
		}
		defer shared.Close() // the program keeps it, and so does the page
		if page, err = unix.Mmap(shared.FD(), 0, int(steeringSize), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
			return nil, nil, fmt.Errorf("mapping the map that the loop shares: %w", err)
		}
		program = append(program, sparseFirst(flows.FD(), shared.FD(), threads)...)
	} else {
		program = append(program, asm.Mov.Reg(asm.R0, asm.R7), asm.Return())
	}
	defer func() {
		if err != nil && page != nil {
			err, page = errors.Join(err, unix.Munmap(page)), nil
		}
	}()
	p, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "culvert_steer", Type: ebpf.SocketFilter, Instructions: program, License: "Apache-2.0",
	})
	if err != nil {
		return nil, page, fmt.Errorf("loading the program that steers flows (needs CAP_BPF): %w", err)
	}
	return p, page, nil
}

const (
	flowBuckets = 4096
	// A flow is bulk once it has sent bulkBytes within bulkWindow, until it has sent
	// nothing for bulkPause and the loop has drained its queue (encap.Steering).
	bulkBytes  = 32 << 10
	bulkWindow = 10 * time.Millisecond
	bulkPause  = 100 * time.Millisecond
)

// lanes is how a thread's queues are shared: the first is for sparse flows, tcp are for
// bulk TCP flows and other for other bulk flows, which may not slow down if packets are
// dropped. If other is 0, those share the queues of TCP.
type lanes struct{ tcp, other int }

func (l lanes) queues() int { return 1 + l.tcp + l.other }

// lanesFor returns the lanes of each of so many threads. With many threads there are
// fewer: flows are spread over threads, too, and the number of queues of a device (256)
// and of descriptors in a handover (253) is limited.
func lanesFor(threads int) lanes {
	switch {
	case threads <= 8:
		return lanes{4, 3}
	case threads <= 32:
		return lanes{1, 1}
	default:
		return lanes{1, 0}
	}
}

// The layout of encap.Steering.
const (
	steeringSize = unsafe.Sizeof(encap.Steering{})
	turnsSize    = int32(unsafe.Sizeof(encap.Turns{}))
	turnsAt      = int16(unsafe.Offsetof(encap.Steering{}.Turns))
	begunAt      = turnsAt + int16(unsafe.Offsetof(encap.Turns{}.Begun))
	dryAt        = turnsAt + int16(unsafe.Offsetof(encap.Turns{}.Dry))
)

// A flow's map entry.
const (
	flowWindow = 0  // start of its window, ns
	flowBytes  = 8  // bytes sent in it
	flowLast   = 16 // if it is bulk, when it sent last, ns; else 0
	flowQueue  = 24 // to which queue that went
	flowTurn   = 32 // and how many turns had begun there
	flowSize   = 40
)

// sparseFirst selects the queue by the hash in R7, the lane in the stack frame and how
// much the flow has sent: hash % threads if it is sparse, else that plus
// threads * (1 + lane). CPUs may race on a flow's entry; that costs only precision, since
// a move is counted before it is stored.
func sparseFirst(flows, shared, threads int) asm.Instructions {
	const key, queue = -48, -64 // in the stack frame
	// turns leads R2 to the queue's turns, less turnsAt.
	turns := func(otherwise string) asm.Instructions {
		return asm.Instructions{
			asm.LoadMem(asm.R1, asm.RFP, queue, asm.DWord),
			asm.JGT.Imm(asm.R1, encap.SteeredQueues-1, otherwise),
			asm.Mul.Imm(asm.R1, turnsSize),
			asm.LoadMapValue(asm.R2, shared, 0),
			asm.Add.Reg(asm.R2, asm.R1),
		}
	}
	p := asm.Instructions{
		asm.Mov.Reg(asm.R0, asm.R7),
		asm.Mod.Imm32(asm.R0, int32(threads)),
		asm.LoadMem(asm.R1, asm.RFP, laneSlot, asm.DWord),
		asm.Add.Imm(asm.R1, 1),
		asm.Mul.Imm(asm.R1, int32(threads)),
		asm.Add.Reg(asm.R0, asm.R1),
		asm.StoreMem(asm.RFP, queue, asm.R0, asm.DWord),

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

		// It stays bulk until it has paused and its queue was drained since.
		asm.LoadMem(asm.R1, asm.R9, flowLast, asm.DWord),
		asm.JEq.Imm(asm.R1, 0, "window"),
		asm.Mov.Reg(asm.R2, asm.R8),
		asm.Sub.Reg(asm.R2, asm.R1),
		asm.JSLE.Imm(asm.R2, int32(bulkPause), "bulk"),
		asm.LoadMem(asm.R1, asm.RFP, queue, asm.DWord),
		asm.LoadMem(asm.R2, asm.R9, flowQueue, asm.DWord),
		asm.JNE.Reg(asm.R1, asm.R2, "bulk"), // another flow's entry, too
	}
	p = append(p, turns("bulk")...)
	p = append(
		p,
		asm.LoadMem(asm.R3, asm.R2, dryAt, asm.DWord),
		asm.LoadMem(asm.R4, asm.R9, flowTurn, asm.DWord),
		asm.Sub.Reg(asm.R3, asm.R4),
		asm.JSLE.Imm(asm.R3, 0, "bulk"),
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.R9, flowLast, asm.R1, asm.DWord),

		asm.LoadMem(asm.R1, asm.R9, flowWindow, asm.DWord).WithSymbol("window"),
		asm.Mov.Reg(asm.R2, asm.R8),
		asm.Sub.Reg(asm.R2, asm.R1),
		asm.JSLE.Imm(asm.R2, int32(bulkWindow), "same window"),
		asm.StoreMem(asm.R9, flowWindow, asm.R8, asm.DWord),
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.R9, flowBytes, asm.R1, asm.DWord),

		asm.LoadMem(asm.R1, asm.R9, flowBytes, asm.DWord).WithSymbol("same window"),
		asm.LoadMem(asm.R2, asm.R6, 0, asm.Word), // __sk_buff.len
		asm.Add.Reg(asm.R1, asm.R2),
		asm.StoreMem(asm.R9, flowBytes, asm.R1, asm.DWord),
		asm.JLT.Imm(asm.R1, bulkBytes, "sparse"),

		asm.LoadMapValue(asm.R1, shared, 0), // Moves
		asm.Mov.Imm(asm.R2, 1),
		asm.AddAtomic.Mem(asm.R1, asm.R2, asm.DWord, 0),

		asm.StoreMem(asm.R9, flowLast, asm.R8, asm.DWord).WithSymbol("bulk"),
		asm.LoadMem(asm.R1, asm.RFP, queue, asm.DWord),
		asm.StoreMem(asm.R9, flowQueue, asm.R1, asm.DWord),
	)
	p = append(p, turns("of a queue")...)
	return append(
		p,
		asm.LoadMem(asm.R3, asm.R2, begunAt, asm.DWord),
		asm.StoreMem(asm.R9, flowTurn, asm.R3, asm.DWord),
		asm.LoadMem(asm.R0, asm.RFP, queue, asm.DWord).WithSymbol("of a queue"),
		asm.Return(),

		asm.Mov.Reg(asm.R0, asm.R7).WithSymbol("sparse"),
		asm.Mod.Imm32(asm.R0, int32(threads)),
		asm.Return(),
	)
}

// laneSlot is where in the stack frame hashing leaves the lane.
const laneSlot = -56

// hashing computes the packet's flow hash in R7 and its lane in laneSlot, and leaves its
// context in R6. The lane is selected by the low bits of the source address: pods' addresses
// are handed out in order, so a node's first pods have different lanes.
func hashing(l lanes) asm.Instructions {
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
	lane := func(lowest int16, from, of int) asm.Instructions {
		if of == 0 {
			from, of = 0, l.tcp
		}
		return asm.Instructions{
			asm.LoadMem(asm.R1, asm.RFP, buffer+lowest, asm.Byte),
			asm.Mod.Imm(asm.R1, int32(of)),
			asm.Add.Imm(asm.R1, int32(from)),
			asm.StoreMem(asm.RFP, laneSlot, asm.R1, asm.DWord),
		}
	}
	const lowest4, lowest6 = 15, 23 // offsets of the source address's lowest byte
	var p asm.Instructions
	add := func(more ...asm.Instruction) { p = append(p, more...) }
	add(asm.Mov.Reg(asm.R6, asm.R1), asm.Mov.Imm(asm.R7, 0), asm.StoreMem(asm.RFP, laneSlot, asm.R7, asm.DWord))
	add(load(0, 20)...)
	add(
		asm.LoadMem(asm.R8, asm.RFP, buffer, asm.Byte), // version and header length
		asm.Mov.Reg(asm.R1, asm.R8),
		asm.RSh.Imm(asm.R1, 4),
		asm.JEq.Imm(asm.R1, 6, "ipv6"),
		asm.JNE.Imm(asm.R8, 0x45, "addresses4"), // IP options: ignore ports
		asm.LoadMem(asm.R1, asm.RFP, buffer+9, asm.Byte),
		asm.JNE.Imm(asm.R1, unix.IPPROTO_TCP, "addresses4"),
		asm.LoadMem(asm.R1, asm.RFP, buffer+6, asm.Byte), // MF and fragment offset
		asm.And.Imm(asm.R1, 0x3f),
		asm.JNE.Imm(asm.R1, 0, "addresses4"),
		asm.LoadMem(asm.R1, asm.RFP, buffer+7, asm.Byte),
		asm.JNE.Imm(asm.R1, 0, "addresses4"),
	)
	add(lane(lowest4, 0, l.tcp)...)
	add(mix(12)...)
	add(mix(16)...)
	add(load(20, 4)...)
	add(mix(0)...)
	add(asm.Ja.Label("done"))

	four := lane(lowest4, l.tcp, l.other)
	four[0] = four[0].WithSymbol("addresses4")
	add(four...)
	add(mix(12)...)
	add(mix(16)...)
	add(asm.Ja.Label("done"))

	six := load(0, 40)
	six[0] = six[0].WithSymbol("ipv6")
	add(six...)
	for offset := int16(8); offset < 40; offset += 4 {
		add(mix(offset)...)
	}
	add(lane(lowest6, l.tcp, l.other)...)
	add(
		asm.LoadMem(asm.R1, asm.RFP, buffer+6, asm.Byte),
		asm.JNE.Imm(asm.R1, unix.IPPROTO_TCP, "done"),
	)
	add(lane(lowest6, 0, l.tcp)...)
	add(load(40, 4)...)
	add(mix(0)...)

	add(
		// Mix the high bits into the low ones, which select the queue.
		asm.Mov.Reg(asm.R0, asm.R7).WithSymbol("done"),
		asm.RSh.Imm32(asm.R0, 15),
		asm.Xor.Reg(asm.R0, asm.R7),
		asm.Mul.Imm32(asm.R0, 0x2c1b3c6d), // of lowbias32
		asm.RSh.Imm32(asm.R0, 16),
		asm.Mov.Reg(asm.R7, asm.R0),
	)
	return p
}
