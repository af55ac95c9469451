package tunnel

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/host"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
	"culvert/internal/names"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// TestSparseQueue opens devices with separate queues for sparse flows.
func TestSparseQueue(t *testing.T) {
	labtest.NeedTUN(t)
	n := labtest.New(t, lab.Options{Nodes: 1}).Nodes[0]
	if err := n.Do(func() error {
		for _, threads := range []int{1, 3} {
			d, err := openDevice(names.TUN, 1450, deviceSize{threads: threads, sparse: true}, slog.New(slog.DiscardHandler))
			if err != nil {
				return err
			}
			if !d.sparse || len(d.queues) != 2*threads {
				t.Errorf("%d threads: %d queues, and %q", threads, len(d.queues), d.noSparse)
			}
			if err := movesAreCounted(d, threads); err != nil {
				t.Errorf("%d threads: %v", threads, err)
			}
			if err := d.close(); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// movesAreCounted sends many datagrams of one flow through the device, and checks that
// they move to the thread's second queue and that the move is counted.
func movesAreCounted(d *device, threads int) error {
	link, err := netlink.LinkByName(names.TUN)
	if err != nil {
		return err
	}
	if err := errors.Join(
		netlink.LinkSetUp(link),
		netlink.AddrReplace(link, &netlink.Addr{IPNet: host.IPNet(netip.MustParsePrefix("10.5.1.1/24"))}),
	); err != nil {
		return err
	}
	c, err := net.Dial("udp", "10.5.1.2:9")
	if err != nil {
		return err
	}
	defer c.Close()
	before := d.counted().Load()
	const size, packets = 1000, 2 * bulkBytes / 1000
	for range packets {
		if _, err := c.Write(make([]byte, size)); err != nil {
			return err
		}
	}
	if n := d.counted().Load() - before; n != 1 {
		return fmt.Errorf("%d moves were counted, and there was one", n)
	}
	held := make([]int, 2)
	for i, fd := range d.queues {
		for b := make([]byte, 2*size); ; {
			n, err := unix.Read(fd, b)
			if err != nil {
				break
			}
			if n > size {
				held[i/threads]++
			}
		}
	}
	if held[0] == 0 || held[1] == 0 || held[0]+held[1] != packets {
		return fmt.Errorf("of %d datagrams the first queue had %d, and the second %d", packets, held[0], held[1])
	}
	return nil
}

// TestQueuesWithoutBPF opens a device without the capability to load eBPF programs.
func TestQueuesWithoutBPF(t *testing.T) {
	labtest.NeedTUN(t)
	n := labtest.New(t, lab.Options{Nodes: 1}).Nodes[0]
	if err := n.Do(func() error {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3} // pid 0: this thread
		var had, has [2]unix.CapUserData
		if err := unix.Capget(&header, &had[0]); err != nil {
			return err
		}
		has = had
		for _, k := range []int{unix.CAP_BPF, unix.CAP_SYS_ADMIN} {
			has[k/32].Effective &^= 1 << (k % 32)
		}
		if err := unix.Capset(&header, &has[0]); err != nil {
			return err
		}
		d, err := openDevice(names.TUN, 1450, deviceSize{threads: 2, sparse: true}, slog.New(slog.DiscardHandler))
		if err := errors.Join(err, unix.Capset(&header, &had[0])); err != nil {
			return err
		}
		if d.sparse || !d.spread || d.threads != 1 || len(d.queues) != unsteeredQueues || d.counted() != nil {
			t.Errorf("the device is %+v", d)
		}
		return d.close()
	}); err != nil {
		t.Fatal(err)
	}
}
