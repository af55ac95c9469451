package test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"culvert/internal/lab"
)

// TestDoctorOfRealConditions causes conditions that TestDoctorUnderAStoppedDaemon only
// writes into files: etcd cut off by a route of ours (U8), an expired lease, a lease that
// is valid although the clock was set (F5), a directory that cannot be written to (D4).
func TestDoctorOfRealConditions(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.datapath = "kernel"
	n := c.Nodes[0]
	cniFlags := c.installCNI(n)
	culvert := filepath.Join(c.bin, "culvert")
	finds := func(check string, says ...string) {
		t.Helper()
		e := c.doctor(n, cniFlags...)
		if says == nil && e.of(check) != "" {
			t.Errorf("%s on a healthy host:\n%s", check, e.of(check))
		}
		for _, want := range says {
			if !strings.Contains(e.of(check), want) {
				t.Errorf("%s: %q is not said:\n%s", check, want, e.of(""))
			}
		}
	}

	// U8: etcd is in the network and behind the router. While the host has a more specific
	// route to it, all is well; then that route goes.
	const server = "10.5.99.9"
	ipDo(t, c.Fabric, "addr add "+server+"/32 dev lo")
	ipDo(t, n.Namespace, "route add "+server+"/32 via 198.18.0.254")
	usual := c.endpoint
	c.endpoint = c.startEtcd("inside", server+":2379")
	c.setConfig(config)
	p := c.start(n)
	c.waitReady(n, 0)
	finds("store-in-network")
	stop(t, p)
	finds("store-in-network")
	ipDo(t, n.Namespace, "route del "+server+"/32")
	finds("store-in-network", "the etcd server "+server, "Network")
	c.cleanup(n)
	c.endpoint = usual
	c.setConfig(config)

	// F5: the daemon counts the time since boot an hour later than this process does, in a
	// time namespace (time_namespaces(7)): as after the wall clock was set forward by an
	// hour, the lease has ended by one clock and not by the other.
	const ttl = "--lease-ttl=5s"
	p, err := n.Start(lab.Command{
		Name: "n1-time", Path: "/usr/bin/unshare", Args: []string{
			"--time", "--boottime", "3600", "--fork", culvert, "run", "--node-id", n.ID, "--run-dir", n.RunDir, "--etcd-endpoints", c.endpoint, "--datapath", "kernel", ttl,
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	c.waitReady(n, 0)
	text, err := os.ReadFile(filepath.Join(n.RunDir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err == nil {
		err = syscall.Kill(pid, syscall.SIGTERM)
	}
	if err != nil {
		t.Fatal(err)
	}
	<-p.Exited()
	eventually(t, "the lease has ended", func() error { // 5 s
		if e := c.doctor(n, cniFlags...); !strings.Contains(e.of("clock"), "the clock was set since") {
			return fmt.Errorf("%s", e.of(""))
		}
		return nil
	})
	finds("clock", "start the daemon")

	// F5: the lease has ended by both clocks.
	p = c.start(n, ttl)
	c.waitReady(n, 0)
	finds("clock")
	stop(t, p)
	eventually(t, "the lease has ended", func() error {
		if e := c.doctor(n, cniFlags...); !strings.Contains(e.of("subnet-file"), "expired at") {
			return fmt.Errorf("%s", e.of(""))
		}
		return nil
	})
	finds("subnet-file", "no pod is added", "start the daemon")

	// D4: what a unit's ProtectSystem=strict does to the directory of subnet.env.
	p = c.start(n)
	c.waitReady(n, 0)
	finds("subnet-file")
	dir := filepath.Dir(n.SubnetFile())
	out, _ := n.Run(t.Context(), "/usr/bin/unshare", "--mount", "/bin/sh", "-c",
		"mount --bind "+dir+" "+dir+" && mount -o remount,bind,ro "+dir+" && exec "+culvert+" doctor --no-cni -o json --run-dir "+n.RunDir)
	var e examination
	if err := json.Unmarshal(out, &e); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, want := range []string{dir + " cannot be written to: read-only file system", "make it writable for the daemon"} {
		if !strings.Contains(e.of("subnet-file"), want) {
			t.Errorf("%q is not said:\n%s", want, e.of(""))
		}
	}
	stop(t, p)
}
