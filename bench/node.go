package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"

	"culvert/backend"
	"culvert/backend/tunnel"
	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/subnet"
)

// Part is one node's part of a datapath. The nodes' subnets and addresses follow from
// it, so that the nodes need not exchange anything.
type Part struct {
	Datapath string       `json:"datapath"`
	Slot     int          `json:"slot"`     // distinguishes datapaths that share their nodes
	Index    int          `json:"index"`    // of this node in Underlay
	Link     string       `json:"link"`     // name of the underlay's link
	Underlay []netip.Addr `json:"underlay"` // addresses of all nodes
	Port     uint16       `json:"port"`     // UDP port of the tunnel
	RunDir   string       `json:"run_dir"`  // holds the socket that serves the status
	Absent   int          `json:"absent"`   // number of peers in the table without a node
}

// innerNetwork contains the subnets of all nodes; wideNetwork contains it and the
// subnets of absent peers.
var (
	innerNetwork = netip.MustParsePrefix("10.213.0.0/16")
	wideNetwork  = netip.MustParsePrefix("10.192.0.0/10")
)

// innerSubnet returns the k-th node subnet, from 0; its first address is the node's.
func innerSubnet(k int) netip.Prefix {
	a := innerNetwork.Addr().As4()
	a[2] = byte(k + 1)
	return netip.PrefixFrom(netip.AddrFrom4(a), 24)
}

// absentSubnet returns the subnet of the k-th absent peer, which has no node.
func absentSubnet(k int) netip.Prefix {
	a := wideNetwork.Addr().As4()
	a[1] += byte(k >> 8)
	a[2] = byte(k)
	return netip.PrefixFrom(netip.AddrFrom4(a), 24)
}

// member is a node of a datapath.
type member struct {
	index    int
	underlay netip.Addr
	subnet   netip.Prefix // its first address is the node's
}

func (p Part) member(index int) member {
	return member{index, p.Underlay[index], innerSubnet(len(p.Underlay)*p.Slot + index)}
}

func (p Part) self() member { return p.member(p.Index) }

// others returns the other nodes, sorted by subnet.
func (p Part) others() []member {
	var all []member
	for i := range p.Underlay {
		if i != p.Index {
			all = append(all, p.member(i))
		}
	}
	return all
}

// device returns the name of the device that the part creates.
func (p Part) device() string { return fmt.Sprintf("cvbench%d", p.Slot) }

// ErrUnavailable means that this machine cannot run a datapath or a workload.
var ErrUnavailable = errors.New("not available")

// unavailable is an ErrUnavailable whose text is only the reason.
type unavailable string

func (u unavailable) Error() string { return string(u) }
func (unavailable) Is(e error) bool { return e == ErrUnavailable }

// carrier is an open part.
type carrier interface {
	Run(ctx context.Context) error
	Status() api.Datapath
	Close() error
}

// Prefixes of lines that a node prints.
const (
	nodeReady       = "ready "
	nodeUnavailable = "unavailable "
)

// RunNode runs a part of a datapath in the network namespace of this process until
// ctx ends. It prints "ready" and the node's inner address when it accepts traffic.
func RunNode(ctx context.Context, p Part, out io.Writer, log *slog.Logger) error {
	c, err := openCarrier(p, log)
	if errors.Is(err, ErrUnavailable) {
		fmt.Fprintf(out, "%s%s\n", nodeUnavailable, err)
		return err
	}
	if err != nil {
		return fmt.Errorf("%s: %w", p.Datapath, err)
	}
	defer func() { _ = c.Close() }()

	socket, err := api.Listen(p.RunDir)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: api.Handler(
		func() api.Status { return api.Status{Ready: true, Datapath: c.Status()} },
		func() api.Peers { return api.Peers{} },
		func(context.Context) {},
	)}
	go func() { _ = server.Serve(socket) }()
	defer func() { _ = server.Close() }()

	fmt.Fprintf(out, "%s%s\n", nodeReady, p.self().subnet.Addr())
	err = c.Run(ctx)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func openCarrier(p Part, log *slog.Logger) (carrier, error) {
	switch p.Datapath {
	case "vxlan/userspace", "ipip/userspace":
		return openUserspace(p, log)
	case "vxlan/kernel", "ipip/kernel", "host-gw":
		if p.Slot == 0 { // the datapath has the nodes to itself
			return openOwnKernel(p, log)
		}
	}
	switch p.Datapath {
	case "vxlan/kernel":
		return openKernelVXLAN(p)
	case "ipip/kernel":
		return openKernelIPIP(p)
	case "host-gw":
		return openHostGateway(p)
	case "naive":
		return openNaive(p)
	case "wireguard-go":
		return openWireGuard(p, log)
	}
	return nil, fmt.Errorf("`bench node` cannot run the datapath %q", p.Datapath)
}

// userspace is culvert's userspace datapath.
type userspace struct{ *tunnel.Tunnel }

func (u userspace) Close() error { return u.Tunnel.Close(backend.Remove) }

func openUserspace(p Part, log *slog.Logger) (carrier, error) {
	format, _, _ := strings.Cut(p.Datapath, "/")
	s, under, err := snapshot(p, format)
	if err != nil {
		return nil, err
	}
	t, err := tunnel.Open(tunnel.Options{
		Node:   backend.Node{Underlay: under, PublicIPs: []netip.Addr{p.self().underlay}, ProbeInterval: backend.ProbeInterval},
		Config: s.Config, Lease: s.Self, Why: "culvert bench", Log: log,
	})
	if err != nil {
		return nil, err
	}
	if err := t.Apply(context.Background(), s); err != nil {
		return nil, errors.Join(err, t.Close(backend.Remove))
	}
	return userspace{t}, nil
}

// snapshot returns the snapshot for one of culvert's own datapaths: the other nodes
// and the absent peers as leases.
func snapshot(p Part, format string) (subnet.Snapshot, host.Underlay, error) {
	network := innerNetwork
	if p.Absent > 0 {
		network = wideNetwork
	}
	wire := fmt.Sprintf(`{"Type":%q}`, format)
	if format == "vxlan" {
		wire = fmt.Sprintf(`{"Type":%q,"Port":%d}`, format, p.Port)
	}
	cfg, _, err := subnet.ParseConfig(fmt.Appendf(nil, `{"Network":%q,"SubnetLen":24,"Backend":%s}`, network, wire))
	if err != nil {
		return subnet.Snapshot{}, host.Underlay{}, err
	}
	lease := func(m member) subnet.Lease {
		name := "bench-" + m.subnet.Addr().String()
		e := subnet.Endpoint{Subnet: m.subnet, Public: m.underlay}
		if format == "vxlan" {
			e.VTEP = subnet.VTEP{VNI: cfg.Backend.VNI, MAC: subnet.DeriveMAC(name, cfg.Backend.VNI, false)}
		}
		return subnet.Lease{Node: name, Backend: format, Endpoints: []subnet.Endpoint{e}}
	}
	under, err := host.FindUnderlay(host.UnderlaySelector{Interfaces: []string{p.self().underlay.String()}}, host.UnderlayContext{})
	if err == nil {
		err = cfg.CheckUnderlay(under.Networks)
	}
	if err != nil {
		return subnet.Snapshot{}, host.Underlay{}, err
	}
	s := subnet.Snapshot{Config: cfg, Self: lease(p.self())}
	for k := 1; k <= p.Absent; k++ {
		s.Peers = append(s.Peers, lease(member{underlay: absent(k), subnet: absentSubnet(k)}))
	}
	for _, o := range p.others() { // last, since peers are sorted by subnet
		s.Peers = append(s.Peers, lease(o))
	}
	return s, under, nil
}

// absent returns the underlay address of the k-th absent peer, in 100.64.0.0/10
// (RFC 6598).
func absent(k int) netip.Addr { return netip.AddrFrom4([4]byte{100, 64, byte(k >> 8), byte(k)}) }
