package labtest

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Syncs calls f and returns its system calls that make files durable, in order: "sync NAME"
// for each fsync(2) or fdatasync(2) of a file or directory with that base name, and
// "rename" for each rename. A sync for which fail returns true fails with EIO; fail may be
// nil.
//
// f runs on a separate thread, whose system calls seccomp reports to this process
// (seccomp_unotify(2)). System calls of other threads and processes are not seen.
func Syncs(t *testing.T, f func(), fail func(call string) bool) (calls []string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to intercept system calls")
	}
	const (
		newListener = 8 // SECCOMP_FILTER_FLAG_NEW_LISTENER
		userNotify  = 0x7fc00000
		receive     = 0xc0502100 // SECCOMP_IOCTL_NOTIF_RECV
		send        = 0xc0182101 // SECCOMP_IOCTL_NOTIF_SEND
		goOn        = 1          // SECCOMP_USER_NOTIF_FLAG_CONTINUE
	)
	watched := []uint32{unix.SYS_FSYNC, unix.SYS_FDATASYNC, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2}
	program := []bpf.Instruction{bpf.LoadAbsolute{Off: 0, Size: 4}}
	for _, n := range watched {
		program = append(program, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: n, SkipTrue: 1}, bpf.RetConstant{Val: userNotify})
	}
	raw, err := bpf.Assemble(append(program, bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW}))
	if err != nil {
		t.Fatal(err)
	}
	lines := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		lines[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	listener := make(chan int)
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the filter stays with the thread
		p := unix.SockFprog{Len: uint16(len(lines)), Filter: &lines[0]}
		const setModeFilter = 1
		fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, setModeFilter, newListener, uintptr(unsafe.Pointer(&p)))
		if errno != 0 {
			t.Errorf("seccomp: %v", errno)
			listener <- -1
			return
		}
		listener <- int(fd)
		f()
	}()
	fd := <-listener
	if fd < 0 {
		t.FailNow()
	}
	defer unix.Close(fd)
	for {
		select {
		case <-done:
			return calls
		default:
		}
		if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 20); n == 0 || err != nil {
			continue
		}
		// struct seccomp_notif: id, pid, flags, and struct seccomp_data: number, architecture,
		// instruction, arguments.
		var notice [80]byte
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), receive, uintptr(unsafe.Pointer(&notice))); errno != 0 {
			continue
		}
		number := binary.NativeEndian.Uint32(notice[16:])
		call := "rename"
		if number == unix.SYS_FSYNC || number == unix.SYS_FDATASYNC {
			path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", binary.NativeEndian.Uint64(notice[32:])))
			if err != nil {
				path = err.Error()
			}
			call = "sync " + filepath.Base(path)
		}
		calls = append(calls, call)
		var answer [24]byte // struct seccomp_notif_resp: id, value, error, flags
		copy(answer[:8], notice[:8])
		if fail != nil && fail(call) {
			errno := -int32(unix.EIO)
			binary.NativeEndian.PutUint32(answer[16:], uint32(errno))
		} else {
			binary.NativeEndian.PutUint32(answer[20:], goOn)
		}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), send, uintptr(unsafe.Pointer(&answer))); errno != 0 {
			t.Errorf("answering: %v", errno)
			return calls
		}
	}
}
