//go:build system

package system

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"

	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

// dhcpServer leases one address on the nodes' network for four seconds, and
// counts the requests.
type dhcpServer struct {
	addr, router netip.Addr

	mu   sync.Mutex
	seen map[string]int // by message type; a REQUEST from the leased address is "RENEW"
}

func (s *dhcpServer) count(kind string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen[kind]
}

func (s *dhcpServer) serve(c net.PacketConn, _ net.Addr, m *dhcpv4.DHCPv4) {
	kind := m.MessageType().String()
	if m.MessageType() == dhcpv4.MessageTypeRequest && m.ClientIPAddr.Equal(s.addr.AsSlice()) {
		kind = "RENEW"
	}
	s.mu.Lock()
	s.seen[kind]++
	s.mu.Unlock()
	answer := map[dhcpv4.MessageType]dhcpv4.MessageType{
		dhcpv4.MessageTypeDiscover: dhcpv4.MessageTypeOffer, dhcpv4.MessageTypeRequest: dhcpv4.MessageTypeAck,
	}[m.MessageType()]
	if answer == dhcpv4.MessageTypeNone {
		return
	}
	r, err := dhcpv4.NewReplyFromRequest(m,
		dhcpv4.WithMessageType(answer),
		dhcpv4.WithYourIP(s.addr.AsSlice()),
		dhcpv4.WithServerIP(s.router.AsSlice()),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(s.router.AsSlice())),
		dhcpv4.WithNetmask(net.CIDRMask(24, 32)),
		dhcpv4.WithRouter(s.router.AsSlice()),
		dhcpv4.WithLeaseTime(4))
	if err != nil {
		return
	}
	// The client has no address yet.
	_, _ = c.WriteTo(r.ToBytes(), &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpv4.ClientPort})
}

// start serves on the link that has the server's address until the test ends.
func (s *dhcpServer) start(t *testing.T, ns *lab.Namespace) {
	t.Helper()
	var server *server4.Server
	if err := ns.Do(func() error {
		links, err := net.Interfaces()
		if err != nil {
			return err
		}
		for _, l := range links {
			addresses, err := l.Addrs()
			if err != nil {
				return err
			}
			for _, a := range addresses {
				if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr() == s.router {
					// A raw socket, as in ISC's server: the dhcp plugin sends
					// RELEASE from 0.0.0.0, which the kernel does not deliver
					// to other sockets.
					c, err := nclient4.NewRawUDPConn(l.Name, dhcpv4.ServerPort)
					if err != nil {
						return err
					}
					server, err = server4.NewServer(l.Name, nil, s.serve, server4.WithConn(c))
					return err
				}
			}
		}
		return fmt.Errorf("no link has %s", s.router)
	}); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve() }()
	t.Cleanup(func() {
		select {
		case err := <-ended:
			t.Errorf("the DHCP server: %v", err)
		default:
			_ = server.Close()
			<-ended
		}
	})
}

// TestDHCP has pods lease their addresses from a DHCP server on the nodes'
// network, with macvlan and the dhcp daemon of the plugins project:
//
//	fabric: DHCP server ─── eth0 of n1 ─── macvlan ─── pod
func TestDHCP(t *testing.T) {
	built := labtest.Bin(t)
	// The built programs, and macvlan.
	bin := t.TempDir()
	if err := os.Mkdir(filepath.Join(bin, "cni"), 0o755); err != nil {
		t.Fatal(err)
	}
	for target, source := range map[string]string{
		"culvert-cni":    filepath.Join(built, "culvert-cni"),
		"cni/bridge":     filepath.Join(built, "cni", "bridge"),
		"cni/host-local": filepath.Join(built, "cni", "host-local"),
		"cni/dhcp":       filepath.Join(built, "cni", "dhcp"),
		"cni/macvlan":    buildTool(t, "github.com/containernetworking/plugins/plugins/main/macvlan"),
	} {
		if err := os.Symlink(source, filepath.Join(bin, target)); err != nil {
			t.Fatal(err)
		}
	}
	run, err := os.MkdirTemp("", "culvert-dhcp") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(run) })
	socket := filepath.Join(run, "s")
	l := labtest.New(t, lab.Options{Bin: bin, Conflist: func(n *lab.Node) ([]byte, error) {
		return json.Marshal(map[string]any{
			"name": "dhcp", "cniVersion": "1.0.0",
			"plugins": []any{map[string]any{
				"type": "culvert-cni", "subnetFile": n.SubnetFile(), "dataDir": filepath.Join(n.StateDir, "culvert"),
				"delegate": map[string]any{"type": "macvlan", "master": "eth0"},
				"ipam":     map[string]any{"type": "dhcp", "daemonSocketPath": socket},
			}},
		})
	}})
	n := l.Nodes[0]
	leaseSubnet(t, n, "10.42.7.0/24")
	s := &dhcpServer{addr: netip.MustParseAddr("198.18.0.200"), router: l.FabricAddrs[0], seen: map[string]int{}}
	s.start(t, l.Fabric)
	if _, err := n.Start(lab.Command{Name: "dhcp", Path: filepath.Join(bin, "cni", "dhcp"), Args: []string{"daemon", "-socketpath", socket}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the dhcp daemon listens", func() error {
		c, err := net.Dial("unix", socket)
		if err == nil {
			_ = c.Close()
		}
		return err
	})

	pod, err := n.AddPod(t.Context(), "p1")
	if err != nil {
		t.Fatal(err)
	}
	if got := pod.Addr(true); got != s.addr {
		t.Errorf("the pod's address is %s, not the server's %s", got, s.addr)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := pod.Ping(ctx, s.addr, s.router); err != nil {
		t.Error(err)
	}
	if err := pod.Check(t.Context()); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	eventually(t, "the lease is renewed, twice", func() error {
		if s.count("RENEW") < 2 {
			return fmt.Errorf("%d renewals", s.count("RENEW"))
		}
		return nil
	})
	if err := pod.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the lease is released", func() error {
		if s.count("RELEASE") == 0 {
			return errors.New("no RELEASE")
		}
		return nil
	})
	if got := kept(n); len(got) != 0 {
		t.Errorf("after DEL the plugin remembers %v", got)
	}
	renewed := s.count("RENEW")
	time.Sleep(3 * time.Second)
	if s.count("RENEW") != renewed {
		t.Error("a released lease is renewed")
	}
}
