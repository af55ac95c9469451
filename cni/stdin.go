package cni

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"
)

// maxConf is the longest network configuration read, in bytes. A GC with 10,000
// valid attachments takes about 1 MB.
const maxConf = 16 << 20

// BoundedStdin copies in to a memory file and returns it, positioned at its start.
// It returns a CNI error if the input exceeds maxConf: skel would read any amount
// into memory.
func BoundedStdin(in io.Reader) (*os.File, error) {
	fd, err := unix.MemfdCreate("netconf", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, types.NewError(types.ErrIOFailure, "reading standard input", err.Error())
	}
	f := os.NewFile(uintptr(fd), "standard input")
	n, err := io.Copy(f, io.LimitReader(in, maxConf+1))
	if err == nil && n <= maxConf {
		_, err = f.Seek(0, io.SeekStart)
		if err == nil {
			return f, nil
		}
	}
	err = errors.Join(err, f.Close())
	if err != nil {
		return nil, types.NewError(types.ErrIOFailure, "reading standard input", err.Error())
	}
	return nil, types.NewError(types.ErrDecodingFailure, fmt.Sprintf("the network configuration is longer than %d bytes", maxConf), "")
}
