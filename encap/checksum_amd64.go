package encap

import "golang.org/x/sys/cpu"

// hasSumBlocks reports whether the CPU supports sumBlocks.
var hasSumBlocks = cpu.X86.HasAVX2

// sumBlocks returns a running sum, less than 2^56, of the whole blocks of
// blockSize bytes in b.
//
//go:noescape
func sumBlocks(b []byte) uint64
