package test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/internal/lab"
	"culvert/internal/names"
	"culvert/subnet"
)

// TestRandomHostEvents changes two nodes' hosts at random, as administrators, DHCP
// clients, VPNs and other programs do: links and their names, addresses of both families,
// routes, MTU, sysctls and culvert's own state. A peer pings them.
//
//	pod ── n1 (kernel)    ── fabric ── n3 (kernel) ── pod
//	pod ── n2 (userspace) ──┘  etcd
//	        ▲ events
//
// Invariants, for each family:
//   - If for 5 s a host has had the published address, and full-size pings from it to the
//     peer's underlay address have passed, then pings through the tunnel pass.
//   - The daemons do not exit.
//   - A node never publishes a new address that its host does not have.
//
// Every second batch of events ends with the host restored; then pings through the tunnel
// must pass within 90 s.
//
// CULVERT_SEED chooses the events; CULVERT_EVENTS is their number.
func TestRandomHostEvents(t *testing.T) {
	t.Parallel()
	seed, total := uint64(1), 200 // the same events in each run: make nightly takes other seeds
	for _, v := range []struct {
		name string
		set  func(string) error
	}{
		{"CULVERT_SEED", func(s string) (err error) { seed, err = strconv.ParseUint(s, 10, 64); return err }},
		{"CULVERT_EVENTS", func(s string) (err error) { total, err = strconv.Atoi(s); return err }},
	} {
		if s := os.Getenv(v.name); s != "" {
			if err := v.set(s); err != nil {
				t.Fatalf("%s=%s: %v", v.name, s, err)
			}
		}
	}
	t.Logf("CULVERT_SEED=%d CULVERT_EVENTS=%d", seed, total)

	c := newClusterOf(t, lab.Options{Nodes: 3, Prefixes: []netip.Prefix{netip.MustParsePrefix("198.18.0.0/24"), netip.MustParsePrefix("fd00:198:18::/64")}})
	c.setConfig(`{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:12::/48","Backend":{"Type":"vxlan"}}`)
	kinds := []string{"kernel", "userspace", "kernel"}
	var victims []*victim
	for i, n := range c.Nodes {
		daemon := c.start(n, "--datapath="+kinds[i])
		if i < 2 {
			victims = append(victims, &victim{c: c, node: n, daemon: daemon, kind: kinds[i], borne: map[netip.Addr]time.Time{}})
		}
	}
	for _, n := range c.Nodes {
		c.waitReady(n, 2)
	}
	pods := c.pods()
	for i, v := range victims {
		v.pod, v.peer, v.peerPod = pods[i], c.Nodes[2], pods[2]
		v.settle(t, true)
		v.sample(t)
	}
	c.watchPublished(t, victims)

	r := rand.New(rand.NewPCG(seed, 0))
	const batch = 12
	checked := 0
	for done := 0; done < total; done += batch {
		for range batch {
			v := victims[r.IntN(len(victims))]
			v.event(r)
			time.Sleep(time.Duration(r.IntN(150)) * time.Millisecond)
		}
		heal := done/batch%2 == 1 || done+batch >= total
		var all sync.WaitGroup
		var mu sync.Mutex
		for _, v := range victims {
			if heal {
				v.heal()
			}
			all.Go(func() {
				n := v.settle(t, heal)
				mu.Lock()
				checked += n
				mu.Unlock()
			})
		}
		all.Wait()
		for _, v := range victims {
			select {
			case <-v.daemon.Exited():
				t.Errorf("the daemon of %s exited: %v", v.node.ID, v.daemon.Err())
			default:
			}
		}
		if t.Failed() {
			for _, v := range victims {
				v.explain(t)
			}
			t.Fatalf("after %d of %d events; CULVERT_SEED=%d repeats it", done+batch, total, seed)
		}
	}
	if checked == 0 {
		t.Error("the underlay never worked for 5 s, so the tunnel was never checked")
	}
	t.Logf("%d events; the tunnel was checked %d times", total, checked)
}

// victim is a node whose host is changed.
type victim struct {
	c       *cluster
	node    *lab.Node
	daemon  *lab.Process
	kind    string
	pod     *lab.Pod
	peer    *lab.Node
	peerPod *lab.Pod
	history []string // the events so far

	mu    sync.Mutex
	borne map[netip.Addr]time.Time // when the host was last seen with the address
}

// uplink returns the current name of the link to the fabric.
func (v *victim) uplink() string {
	name := ""
	_ = v.node.Do(func() error {
		all, err := net.Interfaces()
		for _, l := range all {
			if l.Name == "eth0" || l.Name == "ens3" || l.Name == "uplink0" {
				name = l.Name
			}
		}
		return err
	})
	return name
}

// do runs commands and records them. It ignores errors: a command may not apply, such as
// the removal of an address that does not exist.
func (v *victim) do(commands ...string) {
	for _, c := range commands {
		err := tryIP(v.node.Namespace, c)
		result := ""
		if err != nil {
			result = " (" + err.Error() + ")"
		}
		v.history = append(v.history, c+result)
	}
}

func (v *victim) own() (four, six string) {
	return v.node.Addrs[0].String() + "/24", v.node.Addrs[1].String() + "/64"
}

// event makes one random change to the host.
func (v *victim) event(r *rand.Rand) {
	up := v.uplink()
	four, six := v.own()
	pick := func(all ...string) string { return all[r.IntN(len(all))] }
	further4 := fmt.Sprintf("198.18.0.%d", 100+r.IntN(8)+20*int(v.node.Addrs[0].As4()[3]))
	further6 := fmt.Sprintf("fd00:198:18::%x", 0x100+r.IntN(8)+0x20*int(v.node.Addrs[0].As4()[3]))
	other := fmt.Sprintf("d%d", r.IntN(4))
	ours := pick(v.devices()...)
	const gw4, gw6 = "198.18.0.254", "fd00:198:18:0:ffff:ffff:ffff:fffe"
	defaults := []string{"route add default via " + gw4, "route add default6 via " + gw6}
	switch r.IntN(26) {
	case 0:
		v.do("link set "+up+" down", "link set "+up+" up")
		v.do(defaults...)
		v.do("addr add " + six + " dev " + up)
	case 1:
		v.do("link set " + up + " down")
	case 2, 3:
		v.do("link set " + up + " up")
		v.do(defaults...)
	case 4:
		v.do("link set " + up + " name " + pick("eth0", "ens3", "uplink0"))
	case 5:
		v.do("link add "+other+" type bridge", fmt.Sprintf("addr add 10.99.%d.1/24 dev %s", r.IntN(9), other), fmt.Sprintf("addr add fd00:99::%d/64 dev %s", r.IntN(9), other), "link set "+other+" up")
	case 6:
		v.do("route add default dev "+other+" metric "+pick("1", "50", "2000"), "route add default6 dev "+other+" metric "+pick("1", "50", "2000"))
	case 7:
		v.do("link del " + other)
	case 8:
		v.do("link add v" + other + " type veth peer w" + other)
	case 9:
		v.do("addr add " + further4 + pick("/24", "/32") + " dev " + up)
	case 10:
		v.do("addr del " + further4 + pick("/24", "/32") + " dev " + up)
	case 11:
		v.do("addr add " + further6 + pick("/64", "/128") + " dev " + up)
	case 12:
		v.do("addr del " + further6 + pick("/64", "/128") + " dev " + up)
	case 13:
		v.do("addr del " + pick(four, six) + " dev " + up)
	case 14, 15:
		v.do("addr add "+four+" dev "+up, "addr add "+six+" dev "+up)
		v.do(defaults...)
	case 16:
		v.do(pick("route del default via "+gw4, "route del default6 via "+gw6))
	case 17:
		v.do(pick(defaults...))
		v.do("route add default via " + gw4 + " src " + further4 + " metric 77")
	case 18:
		v.do("link set " + up + " mtu " + pick("576", "1280", "1340", "1400", "1500", "1500"))
	case 19:
		v.do("sysctl net/ipv4/ip_forward "+pick("0", "1"), "sysctl net/ipv6/conf/all/forwarding "+pick("0", "1"))
	case 20:
		v.do("sysctl net/ipv4/conf/"+up+"/rp_filter "+pick("0", "1", "2"), "sysctl net/ipv6/conf/"+up+"/accept_ra "+pick("0", "1", "2"))
	case 21:
		v.do("link del " + ours)
	case 22:
		v.do("link set " + ours + pick(" down", " mtu 1300"))
	case 23:
		v.do("addr add 169.254.77.7/16 dev "+ours, "route add default dev "+ours+" src 169.254.77.7 metric 3")
	case 24:
		v.history = append(v.history, "delete culvert's routes, neighbours and FDB entries")
		_ = v.node.Do(removeOurs)
	case 25:
		v.history = append(v.history, "delete culvert's nftables table")
		_ = v.node.Do(func() error {
			n, err := nftables.New()
			if err != nil {
				return err
			}
			n.DelTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: names.Table})
			return n.Flush()
		})
	}
}

func (v *victim) devices() []string {
	if v.kind == "kernel" {
		return []string{"cvt.1", "cvt6.1"}
	}
	return []string{"culvert0", "culvert0s"}
}

// removeOurs removes culvert's routes, permanent neighbours and FDB entries.
func removeOurs() error {
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: names.RouteProtocol}, netlink.RT_FILTER_PROTOCOL)
	for _, r := range routes {
		err = errors.Join(err, netlink.RouteDel(&r))
	}
	links, _ := netlink.LinkList()
	for _, l := range links {
		if !names.Managed(l.Attrs().Name) {
			continue
		}
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6, unix.AF_BRIDGE} {
			all, _ := netlink.NeighList(l.Attrs().Index, family)
			for _, e := range all {
				if e.State&netlink.NUD_PERMANENT != 0 {
					err = errors.Join(err, netlink.NeighDel(&e))
				}
			}
		}
	}
	return err
}

// heal restores the host: the uplink is up with an MTU of 1500, its own addresses and the
// default routes; added links are deleted.
func (v *victim) heal() {
	for i := range 4 {
		v.do(fmt.Sprintf("link del d%d", i), fmt.Sprintf("link del vd%d", i))
	}
	up := v.uplink()
	four, six := v.own()
	v.do("link set "+up+" mtu 1500", "link set "+up+" up", "addr add "+four+" dev "+up, "addr add "+six+" dev "+up,
		"route replace default via 198.18.0.254", "route replace default6 via fd00:198:18:0:ffff:ffff:ffff:fffe")
	v.history = append(v.history, "--- restored")
}

// settle waits until the underlay has worked for 5 s in each family, and then checks that
// pings through the tunnel pass. With must the underlay has to work within 90 s; without,
// settle gives up after 6 s. It returns the number of checks.
func (v *victim) settle(t *testing.T, must bool) (checked int) {
	const held = 5 * time.Second
	const deadline = 90 * time.Second
	var since [2]time.Time
	var done [2]bool
	var last [2]string
	began := time.Now()
	for !done[0] || !done[1] {
		limit := held + time.Second
		if must {
			limit = deadline
		}
		if time.Since(began) > limit {
			for i, d := range done {
				if must && !d {
					t.Errorf("%s (%s), restored, family %d: after %s: %s", v.node.ID, v.kind, i, deadline, last[i])
				}
			}
			return checked
		}
		s, err := v.c.status(v.node)
		for i := range done {
			if done[i] {
				continue
			}
			if err == nil {
				err = v.underlayWorks(s, i)
			}
			if err != nil {
				since[i], last[i] = time.Time{}, err.Error()
				continue
			}
			if since[i].IsZero() {
				since[i] = time.Now()
			}
			if time.Since(since[i]) < held {
				continue
			}
			if err := v.tunnelWorks(s, i); err != nil {
				// The underlay may have failed at the same moment: then it is no error.
				if again := v.underlayWorks(s, i); again != nil {
					since[i], last[i] = time.Time{}, again.Error()
					continue
				}
				t.Errorf("%s (%s): for %s the host had the published address and the underlay worked, but: %v", v.node.ID, v.kind, held, err)
				return checked
			}
			done[i] = true
			checked++
		}
		time.Sleep(250 * time.Millisecond)
	}
	return checked
}

// underlayWorks returns an error unless the host has the published address of a family,
// reaches the peer's underlay address from it, and has an MTU large enough for the tunnel.
func (v *victim) underlayWorks(s api.Status, family int) error {
	var at netip.Addr
	if s.Lease != nil {
		for _, a := range s.Lease.PublicIPs {
			if a.Is4() == (family == 0) {
				at = a
			}
		}
	}
	if !at.IsValid() {
		return fmt.Errorf("no address is published: %s", s.NotReady)
	}
	mtu, err := v.uplinkMTU()
	if err != nil {
		return err
	}
	borne := false
	err = v.node.Do(func() error {
		all, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
		borne = slices.ContainsFunc(all, func(a netlink.Addr) bool { return a.IP.Equal(at.AsSlice()) })
		return err
	})
	if err != nil || !borne {
		return fmt.Errorf("the host does not have the address %s: %w", at, err)
	}
	if err := sizedPing(v.node.Namespace, at, v.peer.Addrs[family], mtu); err != nil {
		return fmt.Errorf("the underlay: %w", err)
	}
	// With a smaller MTU the tunnel cannot carry the least IP packet.
	if family == 0 && mtu < 576+70 || family == 1 && mtu < 1280+70 {
		return fmt.Errorf("the MTU of %d is too small", mtu)
	}
	return nil
}

func (v *victim) uplinkMTU() (mtu int, err error) {
	name := v.uplink()
	err = v.node.Do(func() error {
		l, err := netlink.LinkByName(name)
		if err == nil {
			mtu = l.Attrs().MTU
		}
		return err
	})
	return mtu, err
}

// tunnelWorks pings from the peer's pod with the largest packets that the node's reported
// MTU, its link and the peer's pod allow.
func (v *victim) tunnelWorks(s api.Status, family int) error {
	mtu, err := v.uplinkMTU()
	if err != nil {
		return err
	}
	// A slow machine may take long for a repair: go on while the underlay works.
	for began := time.Now(); time.Since(began) < 60*time.Second; {
		if err = sizedPing(v.peerPod.Namespace, v.peerPod.Addrs[family], v.pod.Addrs[family], min(s.Datapath.MTU, mtu-70, 1430)); err == nil || v.underlayWorks(s, family) != nil {
			return err
		}
	}
	return fmt.Errorf("through the tunnel: %w", err)
}

// sizedPing sends one echo request in an IP packet of the given size, and waits for the
// reply for a second.
func sizedPing(n *lab.Namespace, source, destination netip.Addr, size int) error {
	network, protocol, header := "ip4:icmp", 1, 20+8
	var request, reply icmp.Type = ipv4.ICMPTypeEcho, ipv4.ICMPTypeEchoReply
	if destination.Is6() {
		network, protocol, header = "ip6:ipv6-icmp", 58, 40+8
		request, reply = ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply
	}
	conn, err := n.ListenPacket(context.Background(), network, source.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	data := make([]byte, max(size-header, 16))
	binary.BigEndian.PutUint64(data, rand.Uint64())
	id := int(binary.BigEndian.Uint16(data))
	text, err := (&icmp.Message{Type: request, Body: &icmp.Echo{ID: id, Seq: 1, Data: data}}).Marshal(nil)
	if err != nil {
		return err
	}
	if _, err := conn.WriteTo(text, &net.IPAddr{IP: destination.AsSlice()}); err != nil {
		return fmt.Errorf("pinging %s from %s with %d bytes: %w", destination, source, size, err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	b := make([]byte, 10000)
	for {
		k, _, err := conn.ReadFrom(b)
		if err != nil {
			return fmt.Errorf("pinging %s from %s with %d bytes: %w", destination, source, size, err)
		}
		m, err := icmp.ParseMessage(protocol, b[:k])
		if err != nil || m.Type != reply {
			continue
		}
		if e, ok := m.Body.(*icmp.Echo); ok && e.ID == id && bytes.Equal(e.Data, data) {
			return nil
		}
	}
}

// sample records the host's addresses 20 times a second until the test ends.
func (v *victim) sample(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			v.look()
			time.Sleep(50 * time.Millisecond)
		}
	}()
	t.Cleanup(func() { cancel(); <-ended })
}

func (v *victim) look() {
	_ = v.node.Do(func() error {
		all, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
		v.mu.Lock()
		defer v.mu.Unlock()
		for _, a := range all {
			if addr, ok := netip.AddrFromSlice(a.IP); ok {
				v.borne[addr.Unmap()] = time.Now()
			}
		}
		return err
	})
}

// watchPublished checks each lease that is written: the host must have had each new
// address just before.
func (c *cluster) watchPublished(t *testing.T, victims []*victim) {
	// A write may take as long as the node waits for its answer.
	const grace = 3 * time.Second
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	watch := c.client().Watch(ctx, "/coreos.com/network/subnets/", clientv3.WithPrefix())
	published := make(map[string][]netip.Addr)
	for _, v := range victims {
		published[v.node.ID] = v.node.Addrs
	}
	go func() {
		defer close(ended)
		for response := range watch {
			for _, e := range response.Events {
				if e.Type != clientv3.EventTypePut {
					continue
				}
				l, err := subnet.ParseLease(strings.TrimPrefix(string(e.Kv.Key), "/coreos.com/network/subnets/"), e.Kv.Value)
				if err != nil {
					t.Errorf("%s: %v", e.Kv.Key, err)
					continue
				}
				i := slices.IndexFunc(victims, func(v *victim) bool { return v.node.ID == l.Node })
				if i < 0 {
					continue
				}
				v := victims[i]
				v.look()
				for _, a := range l.Publics() {
					v.mu.Lock()
					ago := time.Since(v.borne[a])
					v.mu.Unlock()
					if !slices.Contains(published[l.Node], a) && ago > grace {
						t.Errorf("%s has published %s, which its host does not have", l.Node, a)
					}
				}
				published[l.Node] = l.Publics()
			}
		}
	}()
	t.Cleanup(func() { cancel(); <-ended })
}

// explain logs a node's last events and its current state.
func (v *victim) explain(t *testing.T) {
	from := max(0, len(v.history)-80)
	t.Logf("%s (%s): the last events:\n\t%s", v.node.ID, v.kind, strings.Join(v.history[from:], "\n\t"))
	if s, err := v.c.status(v.node); err == nil {
		t.Logf("%s: underlay %+v, lease %+v, ready %t %s, warnings %v", v.node.ID, s.Underlay, s.Lease, s.Ready, s.NotReady, s.Warnings)
	}
	_ = v.node.Do(func() error {
		f, err := host.ReadFacts()
		t.Logf("%s: %+v (%v)", v.node.ID, f, err)
		return err
	})
}
