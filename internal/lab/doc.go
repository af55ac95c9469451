// Package lab makes nodes and pods out of network namespaces, for the demo,
// the benchmarks and the tests. Nothing is made in the namespace of the host:
//
//	<id>-fabric                       the network between the nodes
//	   underlay (bridge)  .254        the store listens here; default gateway
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
// Namespaces are bound under /run/netns, so `ip netns exec` works. What a lab
// consists of is written down in Root/<id>, with the process that owns it, so
// that Sweep can remove what a killed owner left.
package lab
