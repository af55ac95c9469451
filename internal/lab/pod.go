package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// Pod is a container's network namespace, attached to its node by the CNI
// plugins.
type Pod struct {
	*Namespace
	ID     string // "n1-p1"
	Node   *Node
	IfName string // the pod's interface
	// Addrs are the addresses that the plugins assigned, IPv4 first.
	Addrs []netip.Addr
}

// DefaultConflist returns the network configuration list of flannel's manifest
// (kube-flannel.yml) without portmap, with the node's file paths.
func DefaultConflist(n *Node) ([]byte, error) {
	return json.MarshalIndent(map[string]any{
		"name":       "culvert",
		"cniVersion": "1.1.0",
		"plugins": []any{map[string]any{
			"type":       "culvert-cni",
			"subnetFile": n.SubnetFile(),
			"dataDir":    filepath.Join(n.StateDir, "culvert"),
			"ipam":       map[string]any{"dataDir": filepath.Join(n.StateDir, "networks")},
			"delegate":   map[string]any{"hairpinMode": true, "isDefaultGateway": true},
		}},
	}, "", "  ")
}

// cniRuntime executes the node's plugins as a container runtime does.
type cniRuntime struct {
	cni  *libcni.CNIConfig
	list *libcni.NetworkConfigList
	log  *os.File
}

func (n *Node) runtime() (cniRuntime, error) {
	bin := n.lab.options.Bin
	if bin == "" {
		var err error
		if bin, err = FindBin(); err != nil {
			return cniRuntime{}, err
		}
	}
	text, err := n.lab.options.Conflist(n)
	if err != nil {
		return cniRuntime{}, err
	}
	list, err := libcni.NetworkConfFromBytes(text)
	if err != nil {
		return cniRuntime{}, err
	}
	log, err := os.OpenFile(filepath.Join(n.lab.Dir, "logs", n.ID+"-cni.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return cniRuntime{}, err
	}
	exec := &invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: log}}
	dirs := []string{bin, filepath.Join(bin, "cni")}
	return cniRuntime{
		cni:  libcni.NewCNIConfigWithCacheDir(dirs, filepath.Join(n.StateDir, "cache"), exec),
		list: list,
		log:  log,
	}, nil
}

// CNI calls fn with libcni inside the node's namespace.
func (n *Node) CNI(fn func(*libcni.CNIConfig, *libcni.NetworkConfigList) error) error {
	r, err := n.runtime()
	if err != nil {
		return fmt.Errorf("running CNI plugins on %s: %w", n.ID, err)
	}
	defer r.log.Close()
	return n.Do(func() error { return fn(r.cni, r.list) })
}

// AddPod creates a namespace and attaches it by executing the node's CNI plugins.
// The name must be unique among the node's pods.
func (n *Node) AddPod(ctx context.Context, name string) (*Pod, error) {
	return n.AddPodIn(ctx, name, func(*Namespace) error { return nil })
}

// AddPodIn is AddPod with a namespace that is prepared before the pod is attached.
func (n *Node) AddPodIn(ctx context.Context, name string, prepare func(*Namespace) error) (*Pod, error) {
	id := n.ID + "-" + name
	ns, err := n.lab.AddNamespace(id)
	if err != nil {
		return nil, fmt.Errorf("adding pod %s: %w", id, err)
	}
	if err := prepare(ns); err != nil {
		return nil, fmt.Errorf("adding pod %s: %w", id, errors.Join(err, ns.Delete()))
	}
	p := &Pod{Namespace: ns, ID: id, Node: n, IfName: "eth0"}
	err = n.CNI(func(cni *libcni.CNIConfig, list *libcni.NetworkConfigList) error {
		result, err := cni.AddNetworkList(ctx, list, p.runtimeConf())
		if err != nil {
			return err
		}
		r, err := types100.GetResult(result)
		if err != nil {
			return err
		}
		for _, ip := range r.IPs {
			a, ok := netip.AddrFromSlice(ip.Address.IP)
			if !ok {
				return fmt.Errorf("the plugins returned the invalid address %v", ip.Address)
			}
			p.Addrs = append(p.Addrs, a.Unmap())
		}
		return nil
	})
	if err != nil {
		// A runtime calls DEL after a failed ADD.
		return nil, fmt.Errorf("adding pod %s: %w", id, errors.Join(err, p.Delete(ctx)))
	}
	slices.SortStableFunc(p.Addrs, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
	return p, nil
}

// Addr returns the pod's address of the given family, or the zero Addr.
func (p *Pod) Addr(is4 bool) netip.Addr {
	for _, a := range p.Addrs {
		if a.Is4() == is4 {
			return a
		}
	}
	return netip.Addr{}
}

// Check executes the plugins' CHECK for the pod.
func (p *Pod) Check(ctx context.Context) error {
	return p.Node.CNI(func(cni *libcni.CNIConfig, list *libcni.NetworkConfigList) error {
		return cni.CheckNetworkList(ctx, list, p.runtimeConf())
	})
}

// Detach executes the plugins' DEL and keeps the namespace. Detaching twice is not
// an error.
func (p *Pod) Detach(ctx context.Context) error {
	return p.Node.CNI(func(cni *libcni.CNIConfig, list *libcni.NetworkConfigList) error {
		return cni.DelNetworkList(ctx, list, p.runtimeConf())
	})
}

// Delete detaches the pod and removes its namespace.
func (p *Pod) Delete(ctx context.Context) error {
	if err := p.Detach(ctx); err != nil {
		return fmt.Errorf("deleting pod %s: %w", p.ID, err)
	}
	return p.Namespace.Delete()
}

func (p *Pod) runtimeConf() *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: p.Name, NetNS: p.Path, IfName: p.IfName}
}
