package priority_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"culvert/internal/confine"
	"culvert/internal/priority"
)

// TestMain is the process whose priority is raised, too, when the test starts itself.
func TestMain(m *testing.M) {
	if steps := os.Getenv("PRIORITY"); steps != "" {
		if err := take(strings.Fields(steps)); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// taken runs a process that takes steps, and returns what it prints.
func taken(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if strings.HasSuffix(string(out), "cgo") {
		t.Skip("linked with cgo, as for the race detector; the programs are not")
	}
	if strings.HasPrefix(string(out), "limit: refused") {
		t.Skip("needs CAP_SYS_RESOURCE, to give itself a limit as systemd does")
	}
	return string(out)
}

// take takes the steps, and prints the nice values of its threads after each, without
// repeating any.
func take(steps []string) error {
	for _, s := range steps {
		var err error
		switch s {
		case "raise":
			err = priority.Raise()
		case "session":
			b, err := os.ReadFile("/proc/self/autogroup")
			if err != nil {
				return err
			}
			_, nice, _ := strings.Cut(strings.TrimSpace(string(b)), " nice ") // "/autogroup-27 nice 0"
			fmt.Print(s, ": ", nice, "; ")
			continue
		case "lower":
			err = priority.Lower()
		case "limit":
			err = unix.Setrlimit(unix.RLIMIT_NICE, &unix.Rlimit{Cur: 20 - priority.Nice, Max: 20 - priority.Nice})
		case "confine": // takes CAP_SYS_NICE
			err = confine.Process(confine.Options{})
		}
		switch {
		case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
			fmt.Print(s, ": refused; ")
			continue
		case errors.Is(err, syscall.ENOTSUP): // confine, linked with cgo, as for the race detector
			fmt.Print("cgo")
			return nil
		case err != nil:
			return err
		}
		values, err := threads()
		if err != nil {
			return err
		}
		fmt.Print(s, ": ", values, "; ")
	}
	return nil
}

// A daemon that leads its session, as systemd starts it, raises that too; another does not.
func TestRaiseSession(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to have CAP_SYS_NICE")
	}
	if _, err := os.Stat("/proc/self/autogroup"); err != nil {
		t.Skip("this kernel has no autogroups")
	}
	shell := []string{"/bin/sh", "-c", `"$0"; exit $?`, os.Args[0]} // which leads the session
	for _, c := range []struct {
		name, first, want, session string
		command                    []string
	}{
		{"it leads", "", "", "-10", os.Args[:1]},
		{"another leads", "", "", "0", shell},
		{"it leads, as the unit limits it", "limit confine ", "limit: [0]; confine: [0]; ", "-10", os.Args[:1]},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.Command(c.command[0], c.command[1:]...)
			cmd.Env = append(os.Environ(), "PRIORITY="+c.first+"raise session lower session")
			cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
			out := taken(t, cmd)
			if want := c.want + "raise: [-10]; session: " + c.session + "; lower: [0]; session: 0; "; out != want {
				t.Errorf("%q, want %q", out, want)
			}
		})
	}
}

// threads returns the nice values of all threads, one of which is new.
func threads() ([]int, error) {
	started, end := make(chan struct{}), make(chan struct{})
	defer close(end)
	go func() {
		runtime.LockOSThread()
		close(started)
		<-end
	}()
	<-started
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return nil, err
	}
	var all []int
	for _, task := range tasks {
		b, err := os.ReadFile("/proc/self/task/" + task.Name() + "/stat")
		if err != nil {
			return nil, err
		}
		fields := strings.Fields(string(b[strings.LastIndex(string(b), ")")+2:]))
		var nice int
		if _, err := fmt.Sscan(fields[16], &nice); err != nil { // field 19 of proc_pid_stat(5)
			return nil, err
		}
		all = append(all, nice)
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

func TestRaise(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to have CAP_SYS_NICE")
	}
	for _, c := range []struct{ name, steps, want string }{
		{"with the capability", "raise lower", "raise: [-10]; lower: [0]; "},
		{"it stays without", "raise confine", "raise: [-10]; confine: [-10]; "},
		{"without the capability", "confine raise", "confine: [0]; raise: refused; "},
		{"with the limit", "limit confine raise lower raise", "limit: [0]; confine: [0]; raise: [-10]; lower: [0]; raise: [-10]; "},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), "PRIORITY="+c.steps)
			out := taken(t, cmd)
			if out != c.want {
				t.Errorf("%q, want %q", out, c.want)
			}
		})
	}
}

// A nice value that somebody chose stays.
func TestRaiseLeavesOthersChoice(t *testing.T) {
	cmd := exec.Command("nice", "-n", "5", os.Args[0])
	cmd.Env = append(os.Environ(), "PRIORITY=raise lower")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if want := "raise: [5]; lower: [5]; "; string(out) != want {
		t.Errorf("%q, want %q", out, want)
	}
}
