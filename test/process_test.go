package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// findChild returns the PID of parent's child process with the given name, or 0.
func findChild(parent int, name string) int {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0
	}
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		// pid (name) state parent ..., see proc_pid_stat(5)
		text := string(b)
		open, end := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
		fields := strings.Fields(text[end+1:])
		if text[open+1:end] != name || len(fields) < 2 || fields[1] != strconv.Itoa(parent) {
			continue
		}
		pid, err := strconv.Atoi(strings.TrimSpace(text[:open]))
		if err == nil {
			return pid
		}
	}
	return 0
}

func childOf(t *testing.T, parent int, name string) int {
	t.Helper()
	var pid int
	eventually(t, name+" is running", func() error {
		if pid = findChild(parent, name); pid == 0 {
			return fmt.Errorf("process %d has no child %s", parent, name)
		}
		return nil
	})
	return pid
}

func kill(pid int) error { return syscall.Kill(pid, syscall.SIGKILL) }

// alive reports whether the process is running. A zombie is not.
func alive(pid int) bool {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return false
	}
	fields := strings.Fields(string(b)[strings.LastIndexByte(string(b), ')')+1:])
	return len(fields) > 0 && fields[0] != "Z"
}
