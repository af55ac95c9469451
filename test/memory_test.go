package test

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/subnet"
)

// memoryPeers is how many nodes a daemon has as its peers when its memory is
// measured, and memoryMost what it may take then.
const (
	memoryPeers = 100
	memoryMost  = 40.0 // MB, of which 22 are pages of the program's file, shared and reclaimable
)

// TestMemory measures a daemon's resident memory with 100 peers, after it has
// been scraped.
func TestMemory(t *testing.T) {
	for _, datapath := range datapaths {
		t.Run(datapath, func(t *testing.T) {
			c := newCluster(t, 1)
			c.datapath = datapath
			c.setConfig(config)
			n := c.Nodes[0]
			p := c.start(n)
			c.waitReady(n, 0)
			client := c.client()
			for i := range memoryPeers {
				value, err := json.Marshal(map[string]any{
					"PublicIP": fmt.Sprintf("192.0.2.%d", i+1), "BackendType": "vxlan", "NodeID": fmt.Sprintf("node-%d", i),
					"BackendData": map[string]any{"VNI": 1, "VtepMAC": subnet.DeriveMAC(strconv.Itoa(i), 1, false).String()},
				})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := client.Put(t.Context(), fmt.Sprintf("/coreos.com/network/subnets/10.5.%d.0-24", 100+i), string(value)); err != nil {
					t.Fatal(err)
				}
			}
			c.wait(n, "has its peers", func(s api.Status) bool { return s.Ready && s.Datapath.Peers >= memoryPeers })
			for range 3 {
				c.get(n, "/metrics")
			}
			measureMemory(t, c, p)
		})
	}
}

// measureMemory logs the resident memory of a daemon, and fails if it stays
// above memoryMost.
func measureMemory(t *testing.T, c *cluster, p *lab.Process) {
	t.Helper()
	var last string
	eventually(t, "the daemon's memory", func() error {
		m := memoryOf(t, p.PID)
		last = fmt.Sprintf("resident %.1f MB: heap, stacks and buffers %.1f, program %.1f", m["Rss"], m["Anonymous"], m["Rss"]-m["Anonymous"])
		if m["Rss"] > memoryMost {
			return fmt.Errorf("%s", last)
		}
		return nil
	})
	t.Log(last)
}

// memoryOf returns what smaps_rollup says, in MB (10^6 bytes).
func memoryOf(t *testing.T, pid int) map[string]float64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	m := make(map[string]float64)
	for line := range strings.Lines(string(text)) {
		name, value, ok := strings.Cut(line, ":")
		if kb, err := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 64); ok && err == nil {
			m[name] = kb * 1024 / 1e6
		}
	}
	return m
}
