package encap

import "golang.org/x/sys/cpu"

// hasSumBlocks says that the processor knows the instructions of sumBlocks.
var hasSumBlocks = cpu.X86.HasAVX2

// sumBlocks returns what stands for the sum of b in ones' complement, of which
// as much is read as are whole blocks (blockSize). It is less than 2^56.
//
//go:noescape
func sumBlocks(b []byte) uint64
