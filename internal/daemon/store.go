package daemon

import (
	"context"
	"net/netip"
	"time"

	"culvert/internal/api"
	"culvert/internal/overlap"
	"culvert/subnet"
	"culvert/subnet/etcd"
	"culvert/subnet/kept"
	"culvert/subnet/kube"
)

// store is the daemon's view of the lease store: the registry, this node's lease, the
// copy on disk, and the connection.
type store interface {
	subnet.Registry
	holder
	keeper
	connection
}

// holder knows this node's lease and which other node has its subnets.
type holder interface {
	// Held returns the lease as last written or read, and whether there is one.
	Held() (subnet.Lease, bool)
	// TakenBy returns a sentence that names another holder of one of the subnets, ""
	// if there is none. It blocks while the store is unreachable.
	TakenBy(ctx context.Context, node string, publics []netip.Addr, subnets []netip.Prefix) (string, error)
}

// keeper is the snapshot of the leases on disk.
type keeper interface {
	// Kept returns the snapshot, nil if there is none, or why it cannot be used.
	Kept(node string) (*kept.State, error)
	// Resume makes the snapshot's lease the held one, and the next Watch start with its
	// leases.
	Resume(k *kept.State, ttl time.Duration)
	// Forget removes the snapshot, after the lease is lost.
	Forget()
}

// connection is the connection to the store.
type connection interface {
	// Answers returns an error if the store is unreachable or does not answer
	// before ctx ends.
	Answers(ctx context.Context) error
	// Reconnect breaks the connections, which are then made anew, after the node's
	// address has changed.
	Reconnect()
	Close() error
}

// openStore opens the store that the options select.
func (d *node) openStore() (store, error) {
	if d.options.Kubernetes == nil {
		o := d.options.Etcd
		o.Observe = d.state.requests.Observe
		return etcd.New(o)
	}
	o := *d.options.Kubernetes
	o.Waiting, o.Observe = d.state.notReady, d.state.requests.Observe
	r, err := kube.New(o)
	if err != nil {
		return nil, err
	}
	d.state.change(func(s *api.Status) { s.Store.Endpoints = []string{r.Server()} })
	return r, nil
}

// describeStore returns the store's part of the status, without its connection state.
func (o Options) describeStore() api.Store {
	if o.Kubernetes != nil {
		return api.Store{Kind: "kubernetes", Prefix: o.Kubernetes.Prefix}
	}
	return api.Store{Kind: "etcd", Endpoints: o.Etcd.Endpoints, Prefix: o.Etcd.Prefix}
}

// servers returns the store's servers.
func (o Options) servers() overlap.Servers {
	if o.Kubernetes == nil {
		return overlap.Servers{What: overlap.EtcdServer, URLs: o.Etcd.Endpoints}
	}
	s := overlap.Servers{What: "the API server"}
	if at := o.Kubernetes.URL(); at != "" {
		s.URLs = []string{at}
	}
	return s
}

// storeName is the store's name for messages.
func (o Options) storeName() string { return o.describeStore().Name() }

// configPlace says, for messages, where the network configuration is and how to set it.
func (o Options) configPlace() string {
	if o.Kubernetes != nil {
		return o.Kubernetes.NetConf + ": mount the ConfigMap that has it"
	}
	return "etcd: set one with `culvert config set`"
}

// snapshotFile is the path of the snapshot on disk.
func (o Options) snapshotFile() string {
	if o.Kubernetes != nil {
		return o.Kubernetes.SnapshotFile
	}
	return o.Etcd.SnapshotFile
}
