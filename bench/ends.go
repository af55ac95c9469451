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

// What sends and receives.
const (
	// Nodes are sockets on the nodes themselves.
	Nodes = "nodes"
	// Pods are sockets in a pod of each node, as users have them: a network
	// namespace behind a veth on the node's bridge, and a node that forwards.
	//
	//	n1-pod ── veth ── cni0 ── n1 ══ the datapath ══ n2 ── cni0 ── veth ── n2-pod
	Pods = "pods"
)

// Ends returns what can send and receive.
func Ends() []string { return []string{Nodes, Pods} }

// addPods gives every node a pod, made by the same CNI plugins whatever the
// datapath, and makes the pods the site's ends. What tells the plugins a node's
// subnet is subnet.env, which culvert's daemon has written; for every other
// datapath it is written here.
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

// writeSubnetEnv writes what flannel would. The MTU of pods is that of the
// device by which the way to another node's pods leads.
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

// routeSubnets leads to the other nodes' pods without any tunnel or rule:
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
					return fmt.Errorf("route %s by %s: %w", s.subnets[j], o.ID, err)
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
