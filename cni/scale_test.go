package cni_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"culvert/internal/lab"
)

// scale returns full if CULVERT_FULL is set, as by make test-system, else quick.
func scale(full, quick int) int {
	if os.Getenv("CULVERT_FULL") != "" {
		return full
	}
	return quick
}

// TestExhaustion adds more pods than the subnet has addresses, many at a time: every
// address is assigned exactly once; the other ADDs fail and leave nothing behind.
func TestExhaustion(t *testing.T) {
	subnet, want, asked, parallel := "10.42.7.0/27", 29, 40, 10
	if scale(1, 0) > 0 {
		subnet, want, asked, parallel = "10.42.7.0/24", 253, 300, 50
	}
	h := newHost(t, subnet)
	pods := make([]*lab.Namespace, asked)
	for i := range pods {
		pods[i] = sandbox(t, h)
	}
	answers := make([]answer, asked)
	each := func(verb string) {
		var wg sync.WaitGroup
		slots := make(chan struct{}, parallel)
		for i, ns := range pods {
			slots <- struct{}{}
			wg.Go(func() {
				answers[i] = h.run(t, call{verb: verb, id: fmt.Sprintf("c%d", i), netns: ns.Path})
				<-slots
			})
		}
		wg.Wait()
	}
	each("ADD")
	given := 0
	for i, a := range answers {
		switch {
		case a.err == nil:
			given++
		case a.err.Code != types.ErrTryAgainLater || a.err.Msg != "the node's subnet ["+subnet+"] is exhausted: every address is in use":
			t.Errorf("c%d: %+v", i, a.err)
		case slices.Contains(links(t, pods[i]), "eth0"):
			t.Errorf("the ADD of c%d failed, but the pod has an interface", i)
		}
	}
	if got := h.addresses(); given != want || len(got) != want || len(h.records()) != want {
		t.Errorf("%d ADDs succeeded, %d addresses are reserved, %d records; want %d of each", given, len(got), len(h.records()), want)
	}
	if got := linksOnce(t, h.Namespace, 3+want); len(got) != 3+want {
		t.Errorf("the node has %d links, want lo, eth0, cni0 and those of %d pods", len(got), want)
	}
	each("DEL")
	for i, a := range answers {
		if a.err != nil {
			t.Errorf("DEL of c%d: %v", i, a.err)
		}
	}
	h.expect(t, "after DEL", nil, nil)
}

// TestKilledAdds kills ADDs at random points, only the plugin or its whole process
// group. After a GC only the valid pod is left.
func TestKilledAdds(t *testing.T) {
	h := newHost(t, "10.42.7.0/24")
	live := sandbox(t, h)
	took := time.Now()
	h.must(t, call{verb: "ADD", id: "live", netns: live.Path})
	span := time.Since(took)

	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d; an ADD takes %s", seed, span)
	const perPod = 10 // ADDs into one namespace, between GCs
	var finished, early int
	for round := range scale(200, 30) / perPod {
		var dead []*lab.Namespace
		for k := range perPod {
			ns := sandbox(t, h)
			dead = append(dead, ns)
			cmd := exec.Command(filepath.Join(h.bin, "culvert-cni"))
			cmd.Env = []string{
				"CNI_COMMAND=ADD", "CNI_CONTAINERID=k" + strconv.Itoa(round*perPod+k), "CNI_NETNS=" + ns.Path,
				"CNI_IFNAME=eth0", "CNI_PATH=" + filepath.Join(h.bin, "cni"),
			}
			cmd.Stdin = strings.NewReader(h.netconf())
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			if err := h.Do(cmd.Start); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Duration(random.Int64N(int64(span))))
			who := cmd.Process.Pid
			if k%2 == 0 {
				who = -who
			}
			// Not waited for yet, so the PID has not been reused.
			if err := syscall.Kill(who, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			if cmd.Wait() == nil {
				finished++
			}
			if _, err := os.Stat(filepath.Join(h.dataDir(), "k"+strconv.Itoa(round*perPod+k)+":eth0")); err != nil {
				early++
			}
		}
		settle()
		h.must(t, call{verb: "GC", stdin: h.valid("live:eth0")})
		h.expect(t, fmt.Sprintf("after GC, round %d", round), []string{"live:eth0"}, []string{"10.42.7.2"})
		if got := linksOnce(t, h.Namespace, 4); len(got) != 4 { // lo, eth0, cni0, live's
			t.Errorf("round %d: the node has the links %v", round, got)
		}
		for _, ns := range dead {
			if got := links(t, ns); !slices.Equal(got, []string{"lo"}) {
				t.Errorf("round %d: %s has %v", round, ns.Name, got)
			}
			if err := ns.Delete(); err != nil {
				t.Fatal(err)
			}
		}
		for _, name := range names(h.dataDir()) {
			if strings.HasSuffix(name, ".tmp") {
				t.Errorf("round %d: a temporary file is left: %s", round, name)
			}
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("%d finished before they were killed, %d were killed before they saved a record", finished, early)
}

// measureAdds measures, alternately, the plugin's ADD and that of bridge alone, which
// flannel's plugin has to wait for too. It returns the medians.
func measureAdds(t testing.TB, h host, rounds int) (add, bridge time.Duration) {
	t.Helper()
	conf := fmt.Sprintf(`{"cniVersion":"1.1.0","name":"net","type":"bridge","isGateway":true,"ipMasq":false,"mtu":1450,`+
		`"ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"10.42.7.0/24"}]],"routes":[{"dst":"10.42.0.0/16"}]}}`, filepath.Join(h.StateDir, "networks"))
	programs := []string{filepath.Join(h.bin, "culvert-cni"), filepath.Join(h.bin, "cni", "bridge")}
	took := make([][]time.Duration, len(programs))
	for range rounds {
		for i, program := range programs {
			ns := sandbox(t, h)
			for _, verb := range []string{"ADD", "DEL"} {
				cmd := exec.Command(program)
				cmd.Env = []string{"CNI_COMMAND=" + verb, "CNI_CONTAINERID=c", "CNI_NETNS=" + ns.Path, "CNI_IFNAME=eth0", "CNI_PATH=" + filepath.Join(h.bin, "cni")}
				cmd.Stdin = strings.NewReader([]string{h.netconf(), conf}[i])
				start := time.Now()
				if err := h.Do(cmd.Run); err != nil {
					t.Fatal(err)
				}
				if verb == "ADD" {
					took[i] = append(took[i], time.Since(start))
				}
			}
			if err := ns.Delete(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for i := range took {
		slices.Sort(took[i])
	}
	return took[0][rounds/2], took[1][rounds/2]
}

// BenchmarkAdd reports medians in milliseconds. Run it with -benchtime 100x.
func BenchmarkAdd(b *testing.B) {
	add, bridge := measureAdds(b, newHost(b, "10.42.7.0/24"), b.N)
	b.ReportMetric(add.Seconds()*1000, "ms/ADD")
	b.ReportMetric(bridge.Seconds()*1000, "ms/bridge")
	b.ReportMetric((add-bridge).Seconds()*1000, "ms/own")
	b.ReportMetric(0, "ns/op")
}
