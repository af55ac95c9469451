package test

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/lab"
)

// TestUpgrade restarts a kernel node's daemon, as an upgrade does, and then kills it, under
// 1,000 pings per second. The kernel continues to forward: no ping is lost.
func TestUpgrade(t *testing.T) {
	c, daemons, pods := startPair(t, "kernel")
	n, p := c.Nodes[0], daemons[0]
	flow := startFlow(t, pods[0], pods[1])
	for _, end := range []struct {
		name string
		stop func() error
	}{{"SIGTERM", p.Stop}, {"SIGKILL", func() error { return p.Kill() }}} {
		pings := startPingsEvery(t, pods[0], pods[1], time.Millisecond)
		if err := end.stop(); err != nil {
			t.Fatal(err)
		}
		p = c.start(n)
		s := c.wait(n, "is ready again", func(s api.Status) bool { return s.Ready && len(s.Peers) == 1 })
		if len(s.Datapath.Repairs) != 0 {
			t.Errorf("%s: the new daemon repaired %v", end.name, s.Datapath.Repairs)
		}
		c.goesOn(flow)
		sent, lost := pings.stop()
		t.Logf("%s: of %d pings %d lost, longest gap %s", end.name, sent, lost, pings.gap())
		if lost != 0 {
			t.Errorf("%s: of %d pings %d were lost", end.name, sent, lost)
		}
	}
}

// systemd implements systemd's file descriptor store: the notify socket (sd_notify(3)) and
// the descriptors that the daemon stored.
type systemd struct {
	conn   *net.UnixConn
	path   string
	stored chan []*os.File // the descriptors stored last

	starting sync.Mutex // held while a daemon is started with the descriptors
}

func newSystemd(t *testing.T, dir string) *systemd {
	t.Helper()
	s := &systemd{path: filepath.Join(dir, "notify"), stored: make(chan []*os.File, 1)}
	var err error
	if s.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: s.path, Net: "unixgram"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.conn.Close() })
	go func() {
		var held []*os.File
		for text, rights := make([]byte, 4096), make([]byte, 4096); ; {
			n, k, _, _, err := s.conn.ReadMsgUnix(text, rights)
			if errors.Is(err, net.ErrClosed) {
				s.closeAll(held)
				return
			}
			switch string(text[:n]) {
			case "FDSTOREREMOVE=1\nFDNAME=culvert":
				s.closeAll(held)
				held = nil
			case "FDSTORE=1\nFDNAME=culvert":
				messages, _ := unix.ParseSocketControlMessage(rights[:k])
				for _, m := range messages {
					fds, _ := unix.ParseUnixRights(&m)
					for _, fd := range fds {
						held = append(held, os.NewFile(uintptr(fd), "culvert"))
					}
				}
			default:
				continue
			}
			select {
			case <-s.stored:
			default:
			}
			s.stored <- held
		}
	}()
	return s
}

// closeAll closes descriptors that are not stored any more, but not while a daemon is being
// started with them.
func (s *systemd) closeAll(files []*os.File) {
	s.starting.Lock()
	defer s.starting.Unlock()
	for _, f := range files {
		f.Close()
	}
}

// start starts a daemon with the stored descriptors, as systemd does.
func (s *systemd) start(t *testing.T, c *cluster, n *lab.Node, datapath string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, filepath.Join(c.bin, "culvert"),
		"run", "--node-id", n.ID, "--run-dir", n.RunDir, "--etcd-endpoints", c.endpoint, "--datapath", datapath)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+s.path)
	select {
	case held := <-s.stored:
		cmd.ExtraFiles = held
		names := strings.TrimSuffix(strings.Repeat("culvert:", len(held)), ":")
		cmd.Env = append(cmd.Env, "LISTEN_FDNAMES="+names, "LISTEN_FDS="+strconv.Itoa(len(held)))
	default:
	}
	log, err := os.OpenFile(filepath.Join(c.Dir, "logs", "systemd.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	s.starting.Lock()
	err = n.Do(cmd.Start)
	s.starting.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd
}

// TestUpgradeInUserspace is TestUpgrade for the userspace datapath: systemd keeps the TUN
// device and the sockets open during a restart, and the kernel queues the packets. The last
// restart happens while etcd does not answer.
func TestUpgradeInUserspace(t *testing.T) {
	c := newCluster(t, 2)
	c.setConfig(config)
	n := c.Nodes[0]
	s := newSystemd(t, c.Dir)
	cmd := s.start(t, c, n, "userspace")
	c.start(c.Nodes[1])
	for _, n := range c.Nodes {
		c.waitReady(n, 1)
	}
	pods := c.pods()
	ping(t, pods[0], pods[1])
	index := deviceIndex(t, n)
	flow := startFlow(t, pods[0], pods[1])
	for i, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL, syscall.SIGKILL} {
		every := 5 * time.Millisecond // the kernel queues 500 packets, and a slow machine takes a second
		if i == 2 {
			// It takes the daemon half a second to find that etcd does not answer. The
			// kernel can queue that many packets at 100 pings per second.
			every = pingEvery
			c.stopEtcd()
		}
		pings := startPingsEvery(t, pods[0], pods[1], every)
		time.Sleep(100 * time.Millisecond)
		if err := cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		cmd = s.start(t, c, n, "userspace")
		c.wait(n, "is ready again", func(s api.Status) bool { return s.Ready && len(s.Peers) == 1 })
		c.goesOn(flow)
		sent, lost := pings.stop()
		t.Logf("%s: of %d pings %d lost, longest gap %s, slowest reply %s", signal, sent, lost, pings.gap(), pings.slowest)
		if gap := pings.gap(); gap > 100*time.Millisecond {
			t.Errorf("%s: of %d pings %d were lost, with a gap of %s", signal, sent, lost, gap)
		}
		if deviceIndex(t, n) != index {
			t.Errorf("%s: the device was recreated", signal)
		}
	}
	c.continueEtcd()
	// The kernel's vxlan device needs the port of the socket that systemd keeps open.
	for _, kind := range []string{"kernel", "userspace"} {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		cmd = s.start(t, c, n, kind)
		c.wait(n, kind, func(s api.Status) bool { return s.Ready && s.Datapath.Kind == kind })
		c.goesOn(flow)
	}
	if _, _, err := flow.stop(); err != nil {
		t.Error(err)
	}
}

// deviceIndex returns the interface index of the TUN device. It changes if the device is
// recreated.
func deviceIndex(t *testing.T, n *lab.Node) int {
	t.Helper()
	return linkIndex(t, n, "culvert0")
}

// TestKilledWithoutSystemd kills a userspace daemon without a descriptor store: its device
// and routes stay, and the next daemon takes them over.
func TestKilledWithoutSystemd(t *testing.T) {
	c, daemons, pods := startPair(t, "")
	n, p := c.Nodes[0], daemons[0]
	flow := startFlow(t, pods[0], pods[1])
	index := deviceIndex(t, n)
	routes := func() (all []string) {
		if err := n.Do(func() (err error) { all, err = kernelState(); return err }); err != nil {
			t.Fatal(err)
		}
		return all
	}
	before := routes()
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	if got := routes(); len(got) != len(before) || deviceIndex(t, n) != index {
		t.Errorf("after SIGKILL the kernel has %v, before it had %v", got, before)
	}
	c.start(n)
	c.waitReady(n, 1)
	c.goesOn(flow)
	if deviceIndex(t, n) != index {
		t.Error("the device was recreated")
	}
}
