package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// insideEnv tells the re-executed program that it is inside its own namespaces.
const insideEnv = "CULVERT_LAB_NAMESPACES"

// inside is true in the re-executed program.
var inside = false

// Rootless reports whether this process runs in namespaces that EnterUserNamespace
// created. Its labs then disappear when it exits.
func Rootless() bool { return inside }

// EnterUserNamespace ensures that this process may create labs. If it is privileged
// already, again is false and the caller continues. Otherwise the program is
// re-executed with the same arguments in new user, network and mount namespaces, in
// which it is root and /run is empty; when that has exited, again is true and the
// caller must exit with code. If the system does not allow user namespaces, the error
// says which setting prevents them.
//
// Call it first in main, before anything that must not happen twice.
func EnterUserNamespace() (code int, again bool, err error) {
	if os.Getenv(insideEnv) != "" {
		if err := os.Unsetenv(insideEnv); err != nil {
			return 0, false, err
		}
		if err := setUpInside(); err != nil {
			return 0, false, fmt.Errorf("setting up a user namespace: %w%s", err, obstacles())
		}
		inside = true
		return 0, false, nil
	}
	if Privileged() {
		return 0, false, nil
	}
	self, err := os.Executable()
	if err != nil {
		return 0, false, err
	}
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		// In its own process group it gets the terminal's signals from us only,
		// once.
		Setpgid:   true,
		Pdeathsig: syscall.SIGKILL,
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	defer signal.Stop(signals)

	// The kernel sends the parent-death signal when this thread exits.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return 0, false, fmt.Errorf("this needs root or a user namespace, and creating one failed: %w%s", err, obstacles())
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case s := <-signals:
			_ = cmd.Process.Signal(s) // fails if it has just exited
		case err := <-ended:
			var exit *exec.ExitError
			switch {
			case err == nil:
				return 0, true, nil
			case errors.As(err, &exit) && exit.Exited():
				return exit.ExitCode(), true, nil
			case errors.As(err, &exit):
				return 128 + int(exit.Sys().(syscall.WaitStatus).Signal()), true, nil
			}
			return 0, false, err
		}
	}
}

// setUpInside prepares the new namespaces.
func setUpInside() error {
	// Keep the mounts below from propagating to the parent namespace.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
		return fmt.Errorf("mounting an empty /run: %w", err)
	}
	// The inherited /sys shows the parent's network namespace. culvert does not
	// read it, so ignore the error: inside a container sysfs cannot be mounted.
	_ = unix.Mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0); err != nil {
		return fmt.Errorf("writing a network sysctl: %w", err)
	}
	return nil
}

// CheckTUN returns nil if /dev/net/tun can be opened, else an error that says what to
// do.
func CheckTUN() error {
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	switch {
	case err == nil:
		return f.Close()
	case errors.Is(err, os.ErrNotExist):
		return errors.New("/dev/net/tun does not exist: run `modprobe tun`, or start the container with `--device /dev/net/tun`")
	case errors.Is(err, os.ErrPermission):
		return errors.New("this user may not open /dev/net/tun: run as root, or `chmod 0666 /dev/net/tun` as root (the default of most distributions)")
	}
	return fmt.Errorf("TUN devices do not work: %w", err)
}

// obstacles returns the end of an error message: the settings of this system that
// forbid user namespaces and how to change them, or else to run as root.
func obstacles() string {
	var found []string
	for _, s := range []struct{ path, bad, cure string }{
		{"kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"},
		{"kernel/apparmor_restrict_unprivileged_userns", "1", "sysctl kernel.apparmor_restrict_unprivileged_userns=0"},
		{"user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=10000"},
		{"user/max_net_namespaces", "0", "sysctl user.max_net_namespaces=10000"},
		{"user/max_mnt_namespaces", "0", "sysctl user.max_mnt_namespaces=10000"},
	} {
		text, err := os.ReadFile("/proc/sys/" + s.path)
		if err == nil && strings.TrimSpace(string(text)) == s.bad {
			found = append(found, fmt.Sprintf("%s is %s: `%s` as root allows it", strings.ReplaceAll(s.path, "/", "."), s.bad, s.cure))
		}
	}
	if _, err := os.Stat("/proc/self/ns/user"); err != nil {
		found = append(found, "the kernel has no user namespaces (CONFIG_USER_NS)")
	}
	if len(found) == 0 {
		return "; run it as root (in a container: --privileged, or --cap-add SYS_ADMIN --cap-add NET_ADMIN with seccomp and AppArmor unconfined)"
	}
	return "; " + strings.Join(found, "; ") + "; or run it as root"
}
