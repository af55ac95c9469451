package daemon

import (
	"context"
	"net/netip"
	"time"

	"culvert/internal/api"
	"culvert/subnet"
	"culvert/subnet/etcd"
	"culvert/subnet/kept"
	"culvert/subnet/kube"
)

// store is what the daemon needs of where the leases are, beyond the leases
// themselves: what it holds, what it keeps on the disk, and its connection.
type store interface {
	subnet.Registry
	holder
	keeper
	connection
}

// holder knows this node's own lease and who else has its subnet.
type holder interface {
	// Held returns the lease as last written or read, and whether there is one.
	Held() (subnet.Lease, bool)
	// TakenBy names, as a sentence, who else has one of the subnets; empty if
	// nobody has. It waits while the store is unreachable.
	TakenBy(ctx context.Context, node string, publics []netip.Addr, subnets []netip.Prefix) (string, error)
}

// keeper is the copy of the leases on the disk.
type keeper interface {
	// Kept returns the copy, nil if there is none, or why it cannot be used.
	Kept(node string) (*kept.State, error)
	// Resume holds the copy's lease, and has the next Watch begin with its leases.
	Resume(k *kept.State, ttl time.Duration)
	// Forget removes the copy: the lease is not this node's any longer.
	Forget()
}

// connection is the way to the store.
type connection interface {
	// Answers returns an error if the store is unreachable or does not answer
	// before ctx ends.
	Answers(ctx context.Context) error
	// Reconnect breaks the connections, since the node's address has changed.
	Reconnect()
	Close() error
}

// openStore makes the store that the options name.
func (d *node) openStore() (store, error) {
	if d.options.Kubernetes == nil {
		o := d.options.Etcd
		o.Observe = d.health.requests.observe
		return etcd.New(o)
	}
	o := *d.options.Kubernetes
	o.Waiting, o.Observe = d.health.notReady, d.health.requests.observe
	r, err := kube.New(o)
	if err != nil {
		return nil, err
	}
	d.health.change(func(s *api.Status) { s.Store.Endpoints = []string{r.Server()} })
	return r, nil
}

// describeStore is the store in the status, before it is reached.
func (o Options) describeStore() api.Store {
	if o.Kubernetes != nil {
		return api.Store{Kind: "kubernetes", Prefix: o.Kubernetes.Prefix}
	}
	return api.Store{Kind: "etcd", Endpoints: o.Etcd.Endpoints, Prefix: o.Etcd.Prefix}
}

// storeName is the store in a message.
func (o Options) storeName() string { return o.describeStore().Name() }

// configPlace is where the network configuration is, and how to set one.
func (o Options) configPlace() string {
	if o.Kubernetes != nil {
		return o.Kubernetes.NetConf + ": mount the ConfigMap that has it"
	}
	return "etcd: set one with `culvert config set`"
}

// snapshotFile is where the store keeps its copy of the leases.
func (o Options) snapshotFile() string {
	if o.Kubernetes != nil {
		return o.Kubernetes.SnapshotFile
	}
	return o.Etcd.SnapshotFile
}
