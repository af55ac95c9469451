package host

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Release returns the kernel's release and, if it is older than the oldest that culvert
// is tested with, a sentence that says so.
func Release() (release, old string, err error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "", "", fmt.Errorf("reading the kernel's version: %w", err)
	}
	release = unix.ByteSliceToString(name.Release[:])
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err == nil && (major < 5 || major == 5 && minor < 10) {
		old = fmt.Sprintf("Linux %s is older than the versions that culvert is tested with", release)
	}
	return release, old, nil
}

// KernelFix is the remedy for an old kernel.
const KernelFix = "use Linux 5.10 or later"
