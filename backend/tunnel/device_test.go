package tunnel

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/host"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
	"culvert/internal/names"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// TestSparseQueue opens devices with separate queues for sparse flows and for kinds of
// bulk flows.
func TestSparseQueue(t *testing.T) {
	labtest.NeedTUN(t)
	n := labtest.New(t, lab.Options{Nodes: 1}).Nodes[0]
	for _, c := range []struct{ threads, queues int }{{1, 8}, {3, 24}, {9, 27}, {33, 66}} {
		t.Run(fmt.Sprint(c.threads), func(t *testing.T) {
			if err := n.Do(func() error {
				d, err := openDevice(names.TUN, 1450, deviceSize{threads: c.threads, sparse: true}, slog.New(slog.DiscardHandler))
				if err != nil {
					return err
				}
				if !d.sparse || len(d.queues) != c.queues {
					return errors.Join(fmt.Errorf("%d queues, and %q", len(d.queues), d.noSparse), d.close())
				}
				return errors.Join(flowsAreSteered(t, d), flowsMoveBack(t, d), floodLeavesRoom(t, d), d.close())
			}); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// flowsAreSteered sends bulk flows through the device. Each must move once, from a
// thread's first queue to that of its lane, which is another for each of the first pods
// and for TCP and UDP, if there are so many; and the move is counted.
func flowsAreSteered(t *testing.T, d *device) error {
	const packets = 2 * bulkBytes / packetSize
	l := lanesFor(d.threads)
	users := make(map[int][]flow) // of each lane
	for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		for pod := byte(2); pod < 5; pod++ {
			f := flow{proto, pod}
			before := d.steered().Moves.Load()
			if err := f.send(packets); err != nil {
				return err
			}
			if n := d.steered().Moves.Load() - before; n != 1 {
				t.Errorf("%v: %d moves were counted, and there was one", f, n)
			}
			held := make([]int, l.queues())
			for i, n := range readAll(d)[f] {
				held[i/d.threads] += n
			}
			lane := slices.IndexFunc(held[1:], func(n int) bool { return n > 0 })
			if lane < 0 || held[0] == 0 || held[0]+held[1+lane] != packets {
				t.Errorf("%v: of %d packets the queues had %d", f, packets, held)
			}
			users[lane] = append(users[lane], f)
		}
	}
	if want := min(6, l.tcp+l.other); len(users) < want {
		t.Errorf("the lanes' users are %v: want %d lanes", users, want)
	}
	return nil
}

// flowsMoveBack pauses a bulk flow. It moves back to the first queue only after the loop
// has drained the other one in a turn that began after the flow's last packet.
func flowsMoveBack(t *testing.T, d *device) error {
	f := flow{unix.IPPROTO_TCP, 9}
	if err := f.send(2 * bulkBytes / packetSize); err != nil {
		return err
	}
	queue := slices.IndexFunc(readAll(d)[f][d.threads:], func(n int) bool { return n > 0 }) + d.threads
	turns := &d.steered().Turns[queue]
	for _, c := range []struct {
		name       string
		begun, dry uint64
		bulk       bool
	}{
		{"nobody looked at the queue", 0, 0, true},
		{"a turn has begun", 1, 0, true},
		{"that turn left nothing, but began before the last packet", 1, 1, true},
		{"a later turn left something", 2, 1, true},
		{"a turn after the last packet left nothing", 3, 3, false},
	} {
		time.Sleep(bulkPause + bulkPause/10)
		turns.Begun.Store(c.begun)
		turns.Dry.Store(c.dry)
		if err := f.send(1); err != nil {
			return err
		}
		held := readAll(d)[f]
		if held == nil || (held[queue] == 1) != c.bulk {
			t.Errorf("%s: the queues had %v of its packets", c.name, held)
		}
	}
	return nil
}

// floodLeavesRoom floods the device with datagrams, which nobody reads, until it drops
// them. It holds every packet of TCP connections that are sent then.
func floodLeavesRoom(t *testing.T, d *device) error {
	if lanesFor(d.threads).other == 0 {
		return nil // no queue of their own
	}
	flood, connections := flow{unix.IPPROTO_UDP, 2}, []flow{{unix.IPPROTO_TCP, 2}, {unix.IPPROTO_TCP, 3}}
	const datagrams, packets = 1000, 200
	if err := flood.send(datagrams); err != nil {
		return err
	}
	for _, f := range connections {
		if err := f.send(packets); err != nil {
			return err
		}
	}
	held := readAll(d)
	sum := func(f flow) (n int) {
		for _, k := range held[f] {
			n += k
		}
		return n
	}
	if n := sum(flood); n == datagrams {
		t.Errorf("the device held all of %d datagrams: there was no flood", n)
	}
	for _, f := range connections {
		if n := sum(f); n != packets {
			t.Errorf("%v: of %d packets beside a flood the device held %d", f, packets, n)
		}
	}
	return nil
}

// flow is a flow of 10.5.1.pod, by its IP protocol.
type flow struct{ proto, pod byte }

const packetSize = 1000 // bytes

// send sends packets of the flow through the TUN device of this namespace.
func (f flow) send(packets int) error {
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
	raw, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW) // with IP_HDRINCL
	if err != nil {
		return err
	}
	defer unix.Close(raw)
	packet := make([]byte, packetSize)
	copy(packet, []byte{0x45, 8: 64, 9: f.proto, 12: 10, 5, 1, f.pod, 10, 5, 1, 200, 1, 2, 3, 4})
	for range packets {
		err := unix.Sendto(raw, packet, 0, &unix.SockaddrInet4{Addr: [4]byte{10, 5, 1, 200}})
		if err != nil && !errors.Is(err, unix.ENOBUFS) { // the device dropped it
			return err
		}
	}
	return nil
}

// readAll empties the device, and returns how many packets of each flow each queue held.
func readAll(d *device) map[flow][]int {
	held := make(map[flow][]int)
	for i, fd := range d.queues {
		for b := make([]byte, 10+2*packetSize); ; {
			n, err := unix.Read(fd, b)
			if err != nil {
				break
			}
			if n != 10+packetSize || b[10] != 0x45 {
				continue // the kernel's own, such as router solicitations
			}
			f := flow{b[10+9], b[10+15]}
			if held[f] == nil {
				held[f] = make([]int, len(d.queues))
			}
			held[f][i]++
		}
	}
	return held
}

// TestInheritQueues takes over devices of predecessors: with as many queues, with the two
// of an earlier version, and with those of a steered device by a daemon that cannot load a
// program.
func TestInheritQueues(t *testing.T) {
	labtest.NeedTUN(t)
	n := labtest.New(t, lab.Options{Nodes: 1}).Nodes[0]
	log := slog.New(slog.DiscardHandler)
	size := deviceSize{threads: 1, sparse: true}
	for _, c := range []struct {
		name   string
		queues int
		bpf    bool
	}{{"the same", 8, true}, {"an earlier version's", 2, true}, {"no longer steered", 8, false}} {
		t.Run(c.name, func(t *testing.T) {
			if err := n.Do(func() error {
				before := &device{threads: 1, sparse: true}
				if err := before.openMany(names.TUN, c.queues); err != nil {
					return err
				}
				fds := inherited{before.queues}
				before.queues = nil // the successor owns them
				var d *device
				take := func() (err error) {
					d, err = fds.openDevice(names.TUN, 1450, size, log)
					return err
				}
				var err error
				if c.bpf {
					err = take()
				} else {
					err = withoutBPF(take)
				}
				if err != nil {
					return errors.Join(err, before.close())
				}
				if d.sparse != c.bpf || d.spread == c.bpf || len(d.queues) != 8 || d.threads != 1 {
					t.Errorf("the device is %+v", d)
				}
				if c.bpf {
					// Until the predecessor stops, its program steers.
					moving := flow{unix.IPPROTO_TCP, 7}
					err = errors.Join(moving.send(2*bulkBytes/packetSize), d.start())
					if n := before.steered().Moves.Load(); n != 1 {
						t.Errorf("the predecessor's program counted %d moves of one flow", n)
					}
					readAll(d)
					err = errors.Join(err, flowsAreSteered(t, d), floodLeavesRoom(t, d))
				} else if err = (flow{unix.IPPROTO_UDP, 2}).send(100); err == nil {
					// The predecessor's program would move the flow to another queue.
					if held := readAll(d)[flow{unix.IPPROTO_UDP, 2}]; slices.Max(held) != 100 {
						t.Errorf("the queues hold %d", held)
					}
				}
				return errors.Join(err, d.close(), before.close())
			}); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// withoutBPF calls fn on this thread without the capability to load eBPF programs.
func withoutBPF(fn func() error) error {
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
	return errors.Join(fn(), unix.Capset(&header, &had[0]))
}

// TestQueuesWithoutBPF opens a device without the capability to load eBPF programs.
func TestQueuesWithoutBPF(t *testing.T) {
	labtest.NeedTUN(t)
	n := labtest.New(t, lab.Options{Nodes: 1}).Nodes[0]
	if err := n.Do(func() error {
		var d *device
		if err := withoutBPF(func() (err error) {
			d, err = openDevice(names.TUN, 1450, deviceSize{threads: 2, sparse: true}, slog.New(slog.DiscardHandler))
			return err
		}); err != nil {
			return err
		}
		if d.sparse || !d.spread || d.threads != 1 || len(d.queues) != unsteeredQueues || d.steered() != nil {
			t.Errorf("the device is %+v", d)
		}
		return d.close()
	}); err != nil {
		t.Fatal(err)
	}
}
