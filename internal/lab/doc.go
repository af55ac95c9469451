// Package lab creates nodes and pods in network namespaces, for the demo, the
// benchmarks and the tests. It starts programs in them but knows nothing of their
// configuration, and it creates nothing in the host's own network namespace:
//
//	<id>-fabric                       the network between the nodes
//	   underlay (bridge)  .254        default gateway; the store listens here
//	    |          |
//	   n1         n2      (veth)
//	    |          |
//	   eth0 .1    eth0 .2
//	<id>-n1      <id>-n2              a node: its daemon, tunnel device, cni0
//	   cni0       cni0
//	    |          |      (veth, made by the real bridge plugin)
//	   eth0       eth0
//	<id>-n1-p1   <id>-n2-p1           a pod
//
// Namespaces are bind-mounted in /run/netns, so `ip netns exec` works. The package
// owns Root (/run/culvert-lab): Root/<id> records a lab's owner and processes, so
// that Sweep can remove the labs of owners that were killed.
package lab
