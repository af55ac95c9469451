package test

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/subnet"
)

// memoryPeers is how many peers a daemon has when its memory is measured, and memoryMost
// what it may use then.
const (
	memoryPeers = 100
	memoryMost  = 30.0 // MB
)

// TestMemory measures a daemon's resident memory with 100 peers in etcd, after it has
// been scraped; with CULVERT_MEMORY_AFTER=1m that time after. TestKubernetesMemory is
// the same for Kubernetes.
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
			c.measureMemory(n, p)
		})
	}
}

// measureMemory waits until a daemon has its peers, scrapes it, and logs its resident
// memory. It fails if the memory stays above memoryMost.
func (c *cluster) measureMemory(n *lab.Node, p *lab.Process) {
	c.t.Helper()
	c.wait(n, "has its peers", func(s api.Status) bool { return s.Ready && s.Datapath.Peers >= memoryPeers })
	for range 3 {
		c.get(n, "/metrics")
	}
	if after := os.Getenv("CULVERT_MEMORY_AFTER"); after != "" {
		d, err := time.ParseDuration(after)
		if err != nil {
			c.t.Fatal(err)
		}
		time.Sleep(d)
	}
	var last string
	eventually(c.t, "the daemon's memory", func() error {
		m := memoryOf(c.t, p.PID)
		last = fmt.Sprintf("resident %.1f MB: heap, stacks and buffers %.1f, files %.1f, shared %.1f", m["VmRSS"], m["RssAnon"], m["RssFile"], m["RssShmem"])
		if m["VmRSS"] > memoryMost {
			return fmt.Errorf("%s", last)
		}
		return nil
	})
	c.t.Log(last)
}

// memoryOf returns the sizes in /proc/PID/status, in MB (10^6 bytes).
func memoryOf(t testing.TB, pid int) map[string]float64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	m := make(map[string]float64)
	for line := range strings.Lines(string(text)) {
		name, value, ok := strings.Cut(line, ":")
		value, isSize := strings.CutSuffix(strings.TrimSpace(value), " kB")
		if kb, err := strconv.ParseFloat(value, 64); ok && isSize && err == nil {
			m[name] = kb * 1024 / 1e6
		}
	}
	return m
}
