package confine_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"culvert/internal/confine"
)

// TestMain is the confined process too, when the test starts itself.
func TestMain(m *testing.M) {
	if os.Getenv("CONFINED") != "" {
		os.Exit(confined())
	}
	os.Exit(m.Run())
}

// confined confines the process and prints the remaining privileges.
func confined() int {
	err := confine.Process(confine.Options{Kill: os.Getenv("CONFINED") == "kill"})
	if errors.Is(err, syscall.ENOTSUP) {
		fmt.Println("cgo")
		return 0
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	// A thread that is new, and one that was there.
	for range 2 {
		done := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			b, _ := os.ReadFile("/proc/thread-self/status")
			for line := range strings.Lines(string(b)) {
				if strings.HasPrefix(line, "Cap") || strings.HasPrefix(line, "NoNewPrivs") || strings.HasPrefix(line, "Seccomp:") {
					fmt.Print(line)
				}
			}
			close(done)
		}()
		<-done
	}
	_, _, errno := syscall.RawSyscall(unix.SYS_PTRACE, unix.PTRACE_TRACEME, 0, 0)
	fmt.Println("ptrace:", errno)
	fmt.Println("unshare:", unix.Unshare(0))
	fmt.Println("keyctl:", func() error { _, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_SESSION_KEYRING, false); return err }())
	out, err := exec.Command("/bin/cat", "/proc/self/status").Output()
	fmt.Println("exec:", err)
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "CapPrm") || strings.HasPrefix(line, "Seccomp:") {
			fmt.Print("child ", line)
		}
	}
	return 0
}

func TestProcess(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: the process has no privileges to drop")
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "CONFINED=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if strings.HasPrefix(string(out), "cgo") {
		t.Skip("linked with cgo, as for the race detector; the programs are not")
	}
	const kept = 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW | 1<<unix.CAP_NET_BIND_SERVICE | 1<<unix.CAP_BPF
	lines := 0
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		value = strings.TrimSpace(value)
		lines++
		switch name {
		case "CapPrm", "CapEff", "CapBnd", "child CapPrm":
			var set uint64
			if _, err := fmt.Sscanf(value, "%x", &set); err != nil || set&^kept != 0 || set&(1<<unix.CAP_NET_ADMIN) == 0 {
				t.Errorf("%s is %s", name, value)
			}
		case "CapInh", "CapAmb":
			if strings.Trim(value, "0") != "" {
				t.Errorf("%s is %s", name, value)
			}
		case "NoNewPrivs":
			if value != "1" {
				t.Errorf("%s is %s", name, value)
			}
		case "Seccomp", "child Seccomp":
			if value != "2" {
				t.Errorf("%s is %s", name, value)
			}
		case "ptrace", "unshare", "keyctl":
			if !strings.Contains(value, unix.EPERM.Error()) {
				t.Errorf("%s: %s", name, value)
			}
		case "exec":
			if value != "<nil>" {
				t.Errorf("%s: %s", name, value)
			}
		default:
			t.Errorf("said: %s", line)
		}
	}
	if lines < 20 {
		t.Errorf("only %d lines: %s", lines, out)
	}
}

// With Kill a denied call kills the process, so that tests detect it.
func TestKill(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "CONFINED=kill")
	out, err := cmd.CombinedOutput()
	if strings.HasPrefix(string(out), "cgo") {
		t.Skip("linked with cgo")
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGSYS {
		t.Errorf("it ended with %v: %s", err, out)
	}
}
