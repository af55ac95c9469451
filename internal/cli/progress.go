package cli

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// progressAfter is the time after which a command without output prints what it waits
// for.
const progressAfter = time.Second

// whileWaiting prints what a command is doing, on a terminal, if it takes longer than
// progressAfter. The caller calls stop before it prints.
func whileWaiting(c *cobra.Command, doing string) (stop func()) {
	err, ok := c.ErrOrStderr().(*os.File)
	if !ok {
		return func() {}
	}
	if _, failed := unix.IoctlGetWinsize(int(err.Fd()), unix.TIOCGWINSZ); failed != nil {
		return func() {}
	}
	t := time.AfterFunc(progressAfter, func() { fmt.Fprintln(err, doing) })
	return func() { t.Stop() }
}
