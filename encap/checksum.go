package encap

import (
	"encoding/binary"
	"math/bits"
)

// The Internet checksum (RFC 1071) is a ones' complement sum, which does not
// depend on byte order or word size: running sums are 64 bits wide, over words
// loaded in host byte order, and fold reduces them to 16 bits.

// blockSize is how many bytes sumBlocks adds at a time.
const blockSize = 128

// sum adds b to the running sum acc. Only the last call may add an odd number of
// bytes.
func sum(b []byte, acc uint64) uint64 {
	var carry uint64
	if hasSumBlocks && len(b) >= 2*blockSize {
		n := len(b) &^ (blockSize - 1)
		acc, carry = bits.Add64(acc, sumBlocks(b[:n]), 0)
		acc += carry
		b = b[n:]
	}
	for len(b) >= 64 {
		acc, carry = bits.Add64(acc, binary.NativeEndian.Uint64(b), 0)
		acc, carry = bits.Add64(acc, binary.NativeEndian.Uint64(b[8:]), carry)
		acc, carry = bits.Add64(acc, binary.NativeEndian.Uint64(b[16:]), carry)
		acc, carry = bits.Add64(acc, binary.NativeEndian.Uint64(b[24:]), carry)
		acc, carry = bits.Add64(acc, binary.NativeEndian.Uint64(b[32:]), carry)
		acc, carry = bits.Add64(acc, binary.NativeEndian.Uint64(b[40:]), carry)
		acc, carry = bits.Add64(acc, binary.NativeEndian.Uint64(b[48:]), carry)
		acc, carry = bits.Add64(acc, binary.NativeEndian.Uint64(b[56:]), carry)
		acc += carry
		b = b[64:]
	}
	for len(b) >= 8 {
		acc, carry = bits.Add64(acc, binary.NativeEndian.Uint64(b), 0)
		acc += carry
		b = b[8:]
	}
	if len(b) > 0 {
		var tail [8]byte
		copy(tail[:], b)
		acc, carry = bits.Add64(acc, binary.NativeEndian.Uint64(tail[:]), 0)
		acc += carry
	}
	return acc
}

// fold reduces a running sum to 16 bits, in host byte order as loaded from a
// packet, not complemented.
func fold(acc uint64) uint16 {
	acc = acc>>32 + acc&0xffffffff
	acc = acc>>16 + acc&0xffff
	acc = acc>>16 + acc&0xffff
	acc = acc>>16 + acc&0xffff
	return uint16(acc)
}

// add16 adds a 16-bit word given by value, not as loaded from a packet.
func add16(acc uint64, v uint16) uint64 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], v)
	s, carry := bits.Add64(acc, uint64(binary.NativeEndian.Uint16(b[:])), 0)
	return s + carry
}

// putChecksum stores a folded sum at b, not complemented.
func putChecksum(b []byte, v uint16) { binary.NativeEndian.PutUint16(b, v) }

func loadChecksum(b []byte) uint16 { return binary.NativeEndian.Uint16(b) }
