package bench

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// ticks is USER_HZ, the unit of CPU time in /proc (proc(5)): 100 per second on all
// architectures that Linux still supports.
const ticks = 100

// CPUTime is the time that a machine's processors have spent since it booted, in
// seconds.
type CPUTime struct {
	Busy  float64 `json:"busy"`  // including interrupts
	Steal float64 `json:"steal"` // taken by the hypervisor
	Idle  float64 `json:"idle"`
}

func machineCPU() (CPUTime, error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return CPUTime{}, err
	}
	return parseCPU(text)
}

// parseCPU reads the first line of /proc/stat: user nice system idle iowait irq
// softirq steal; guest time is part of user.
func parseCPU(text []byte) (CPUTime, error) {
	line, _, _ := bytes.Cut(text, []byte("\n"))
	f := strings.Fields(string(line))
	if len(f) < 9 || f[0] != "cpu" {
		return CPUTime{}, fmt.Errorf("/proc/stat begins with %q", line)
	}
	var v [8]float64
	for i := range v {
		n, err := strconv.ParseUint(f[i+1], 10, 64)
		if err != nil {
			return CPUTime{}, fmt.Errorf("/proc/stat: %w", err)
		}
		v[i] = float64(n) / ticks
	}
	return CPUTime{Busy: v[0] + v[1] + v[2] + v[5] + v[6], Steal: v[7], Idle: v[3] + v[4]}, nil
}

func (c CPUTime) since(earlier CPUTime) CPUTime {
	return CPUTime{Busy: c.Busy - earlier.Busy, Steal: c.Steal - earlier.Steal, Idle: c.Idle - earlier.Idle}
}

// stolen is the share of the time that the hypervisor took, 0 to 1.
func (c CPUTime) stolen() float64 {
	if all := c.Busy + c.Steal + c.Idle; all > 0 {
		return c.Steal / all
	}
	return 0
}

// processCPU returns the CPU time of a process, in seconds.
func processCPU(pid int) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field is the program's name in parentheses, which may itself
	// contain any character: count fields from the last ")".
	f := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	const utime = 14 - 3 // f[0] is field 3; stime is the next
	if len(f) <= utime+1 {
		return 0, fmt.Errorf("/proc/%d/stat has not the format of proc(5)", pid)
	}
	user, uerr := strconv.ParseUint(f[utime], 10, 64)
	system, serr := strconv.ParseUint(f[utime+1], 10, 64)
	if uerr != nil || serr != nil {
		return 0, fmt.Errorf("/proc/%d/stat has not the format of proc(5)", pid)
	}
	return float64(user+system) / ticks, nil
}

// processRSS returns the resident memory of a process, in bytes.
func processRSS(pid int) (float64, error) {
	text := field(fmt.Sprintf("/proc/%d/status", pid), "VmRSS")
	kb, err := strconv.ParseUint(strings.TrimSuffix(text, " kB"), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("/proc/%d/status has VmRSS %q", pid, text)
	}
	return float64(kb) * 1024, nil
}
