package cli

import (
	"bufio"
	"encoding/json"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"culvert/bench"
)

// benchCommand returns the built program's command; it skips the test if no lab can be
// created.
func benchCommand(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := demoCommand(t)
	cmd.Args = append([]string{cmd.Path, "bench"}, args...)
	return cmd
}

func TestBench(t *testing.T) {
	text, err := benchCommand(t, "--quick", "--underlay", "cloud", "--workload", "tcp1,rr", "--rounds", "1", "--duration", "100ms", "--json").Output()
	if err != nil {
		t.Fatal(err)
	}
	var r bench.Report
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	for _, d := range benchPresets[0].datapaths {
		for w, m := range map[string]bench.Metric{"tcp1": bench.Throughput, "rr": bench.P50} {
			if x, ok := r.Find("cloud", d, w, m); !ok || x.Median <= 0 {
				t.Errorf("%s %s: %+v", d, w, x)
			}
		}
	}
	if off := r.Machine.Offloads["cloud"]; off["tx-udp_tnl-segmentation"] || !off["tx-tcp-segmentation"] {
		t.Errorf("the underlay was %v", off)
	}
}

// TestBenchInterrupted sends Ctrl-C once a part is finished, and expects its result.
func TestBenchInterrupted(t *testing.T) {
	cmd := benchCommand(t, "--underlay", "offload", "--datapath", "native", "--workload", "rr", "--rounds", "1000", "--duration", "50ms")
	var out strings.Builder
	cmd.Stdout = &out
	pipe, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(2*time.Second, func() { _ = cmd.Process.Signal(syscall.SIGINT) })
	said := ""
	for s := bufio.NewScanner(pipe); s.Scan(); {
		said += s.Text() + "\n"
	}
	code := exitCode(cmd.Wait())
	if code != exitError || !strings.Contains(said, "interrupted; this is what was finished") || !strings.Contains(out.String(), "rr p50 us") {
		t.Errorf("exit code %d\n%s\n%s", code, said, &out)
	}
}
