package encap

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A control message of sendmsg(2) and recvmsg(2) begins with a size_t, and so depends on
// the architecture, as the padding between messages does (cmsg(3)):
//
//	 0                 controlWord       +4      SizeofCmsghdr
//	+-----------------+-------+-------+---------------+---------+
//	| length, size_t  | level | kind  | data          | padding |
//	+-----------------+-------+-------+---------------+---------+

// controlWord is the size of a size_t, to whose multiples messages are padded.
const controlWord = int(unsafe.Sizeof(uintptr(0)))

// The header is a size_t and two integers of 4 bytes.
var _ [unix.SizeofCmsghdr - controlWord - 8]struct{}

// controlLen returns the length of a message with its header.
func controlLen(b []byte) int {
	if controlWord == 8 {
		return int(binary.NativeEndian.Uint64(b))
	}
	return int(binary.NativeEndian.Uint32(b))
}

func putControlLen(b []byte, n int) {
	if controlWord == 8 {
		binary.NativeEndian.PutUint64(b, uint64(n))
	} else {
		binary.NativeEndian.PutUint32(b, uint32(n))
	}
}

// controlNext returns where the message after one of n bytes begins.
func controlNext(n int) int { return (n + controlWord - 1) &^ (controlWord - 1) }
