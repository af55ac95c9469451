package bench

import (
	"context"
	"fmt"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"

	"culvert/internal/host"
	"culvert/internal/lab"
)

// The kinds of ends, between which traffic is measured.
const (
	// Nodes are sockets on the nodes themselves.
	Nodes = "nodes"
	// Pods are sockets in a pod on each node: a network namespace behind a veth on
	// the node's bridge, for which the node forwards.
	//
	//	n1-pod ── veth ── cni0 ── n1 ══ the datapath ══ n2 ── cni0 ── veth ── n2-pod
	Pods = "pods"
)

// Ends returns the kinds of ends.
func Ends() []string { return []string{Nodes, Pods} }

// addPods adds a pod to every node, by the same CNI plugins for every datapath, and
// makes the pods the site's ends. The plugins read the node's subnet from subnet.env.
// culvert's daemon writes that file; for other datapaths addPods does.
func (s *site) addPods(ctx context.Context, l *lab.Lab) error {
	for i, n := range l.Nodes {
		if _, err := os.Stat(n.SubnetFile()); err != nil {
			if err := s.writeSubnetEnv(n, i); err != nil {
				return err
			}
		}
		pod, err := n.AddPod(ctx, "pod")
		if err != nil {
			return err
		}
		s.ends[i] = pod.Namespace
		if i == 0 {
			s.to = pod.Addr(true)
		}
	}
	return nil
}

// writeSubnetEnv writes subnet.env as flannel does. The pods' MTU is that of the
// device through which the route to another node's pods goes.
func (s *site) writeSubnetEnv(n *lab.Node, index int) error {
	other := s.subnets[(index+1)%len(s.subnets)]
	mtu := 0
	err := n.Do(func() error {
		routes, err := netlink.RouteGet(other.Addr().Next().AsSlice())
		if err != nil || len(routes) == 0 {
			return fmt.Errorf("%s has no route to the pods in %s: %w", n.ID, other, err)
		}
		dev, err := netlink.LinkByIndex(routes[0].LinkIndex)
		if err == nil {
			mtu = dev.Attrs().MTU
		}
		return err
	})
	if err != nil {
		return err
	}
	bridge := netip.PrefixFrom(s.subnets[index].Addr().Next(), s.subnets[index].Bits())
	text := fmt.Sprintf("FLANNEL_NETWORK=%s\nFLANNEL_SUBNET=%s\nFLANNEL_MTU=%d\nFLANNEL_IPMASQ=true\n", innerNetwork, bridge, mtu)
	return os.WriteFile(n.SubnetFile(), []byte(text), 0o644)
}

// routeSubnets adds routes to the other nodes' pods, without a tunnel:
//
//	ip route add <peer subnet> via B
func (s *site) routeSubnets(l *lab.Lab) error {
	for i, n := range l.Nodes {
		err := n.Do(func() error {
			for j, o := range l.Nodes {
				if j == i {
					continue
				}
				if err := netlink.RouteReplace(&netlink.Route{Dst: host.IPNet(s.subnets[j]), Gw: o.Addrs[0].AsSlice()}); err != nil {
					return fmt.Errorf("route %s via %s: %w", s.subnets[j], o.ID, err)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
