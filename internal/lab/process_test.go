package lab

import (
	"errors"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// A thread of another process may have the PID of a process that has exited.
func TestThreadIsNoProcess(t *testing.T) {
	id, leave := make(chan int), make(chan struct{})
	defer close(leave)
	thread := func() int {
		go func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			id <- unix.Gettid()
			<-leave
		}()
		return <-id
	}
	tid := thread()
	if tid == os.Getpid() { // the first thread
		tid = thread()
	}
	if _, err := (processID{PID: tid}).open(); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("%v", err)
	}
}
