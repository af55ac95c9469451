package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"culvert/subnet"
	"culvert/subnet/kept"
)

// Registry is one node's client of the Kubernetes API. Its methods are safe for
// concurrent use.
type Registry struct {
	c    *client
	opts Options
	keys names
	log  *slog.Logger
	copy *kept.Copy // in the snapshot file

	// nodeLock serializes writers of our Node, across all requests of one operation.
	nodeLock subnet.Lock
	// verifyNow makes Hold verify our Node at once.
	verifyNow subnet.Signal

	mu      sync.Mutex
	held    subnet.Lease  // no Endpoints: none. Has the node's own addresses, even if overwritten
	config  subnet.Config // last valid one; no Networks: none
	text    string        // source of config
	resumed *kept.State   // start of Watch while the API server is unreachable; nil once it was read
	mirror  *mirror       // of the running Watch, or nil
}

var _ subnet.Registry = (*Registry)(nil)

// New returns a registry without sending anything. It fails if the options are
// invalid. The caller must call Close.
func New(o Options) (*Registry, error) {
	o, a, err := o.complete()
	if err != nil {
		return nil, err
	}
	if o.Node == "" {
		return nil, errors.New("kubernetes: the name of this host's Node is unknown; set NODE_NAME, or POD_NAME and POD_NAMESPACE")
	}
	c, err := newClient(a, o.RequestTimeout)
	if err != nil {
		return nil, err
	}
	c.observe = o.Observe
	return &Registry{
		c: c, opts: o, keys: newNames(o.Prefix), log: o.Logger, copy: kept.NewCopy(o.SnapshotFile, o.Logger),
		nodeLock: subnet.NewLock(), verifyNow: subnet.NewSignal(),
	}, nil
}

// Close closes the connections. It does not release the lease (Release).
func (r *Registry) Close() error {
	r.c.http.CloseIdleConnections()
	r.c.breakAll()
	return nil
}

// Reconnect closes the connections to the API server, so that new ones are opened;
// call it after this node's address has changed.
func (r *Registry) Reconnect() { r.c.breakAll() }

// Server returns the API server's URL.
func (r *Registry) Server() string { return r.c.access.server.String() }

// Held returns the lease that this registry holds, and whether there is one.
// Expires is zero while our Node has the subnets; otherwise it is when Hold found
// that it does not.
func (r *Registry) Held() (subnet.Lease, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.held, len(r.held.Endpoints) > 0
}

func (r *Registry) setHeld(l subnet.Lease) {
	r.mu.Lock()
	changed := r.held.Expires != l.Expires
	r.held = l
	m := r.mirror
	r.mu.Unlock()
	if changed && m != nil {
		m.refresh()
	}
}

// NodeName asks the API server on which Node a pod runs, as flannel does if the
// Node's name is not configured.
func NodeName(ctx context.Context, o Options, namespace, pod string) (string, error) {
	o, a, err := o.complete()
	if err != nil {
		return "", err
	}
	c, err := newClient(a, o.RequestTimeout)
	if err != nil {
		return "", err
	}
	defer c.http.CloseIdleConnections()
	var p struct {
		Spec struct {
			NodeName string `json:"nodeName"`
		} `json:"spec"`
	}
	err = c.call(ctx, request{method: http.MethodGet, path: "/api/v1/namespaces/" + namespace + "/pods/" + pod, accept: whole}, &p)
	if err == nil && p.Spec.NodeName == "" {
		err = errors.New("it is not scheduled yet")
	}
	if err != nil {
		return "", fmt.Errorf("look up the Node of the pod %s/%s: %w (or set NODE_NAME)", namespace, pod, err)
	}
	return p.Spec.NodeName, nil
}

// Config implements subnet.Registry.
func (r *Registry) Config(ctx context.Context) (subnet.Config, error) {
	var reminded subnet.Reminder
	for {
		text, err := os.ReadFile(r.opts.NetConf)
		if err == nil {
			var cfg subnet.Config
			var warnings []subnet.Warning
			if cfg, warnings, err = subnet.ParseConfig(text); err == nil {
				r.warn(warnings)
				r.rememberConfig(cfg, string(text))
				return cfg, nil
			}
			err = fmt.Errorf("the network configuration in %s is invalid: %w", r.opts.NetConf, err)
		} else {
			err = fmt.Errorf("%w: mount the ConfigMap with net-conf.json there, or set its path with --net-config-path", err)
		}
		r.opts.Waiting("waiting for a network configuration: " + err.Error())
		if reminded.Due() {
			r.log.Warn("waiting for a network configuration", "file", r.opts.NetConf, "error", err)
		}
		if err := subnet.Sleep(ctx, readConfigEvery); err != nil {
			return subnet.Config{}, fmt.Errorf("wait for the network configuration: %w", err)
		}
	}
}

// readConfigEvery is how often the file is read. The kubelet takes up to a minute
// to update it.
const readConfigEvery = time.Second

func (r *Registry) warn(warnings []subnet.Warning) {
	for _, w := range warnings {
		r.log.Warn("network configuration", "key", w.Key, "warning", w.Message)
	}
}

func (r *Registry) rememberConfig(cfg subnet.Config, text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.config, r.text = cfg, text
}

// NodeAddrs returns the addresses that the administrator gives this node by flannel's
// annotations node-public-ip and node-public-ipv6, IPv4 first. Like flannel, a daemon
// asks once, at its start: they also choose the underlay's interface. NodeAddrs waits
// until our Node exists and each annotation is an address.
func (r *Registry) NodeAddrs(ctx context.Context) ([]netip.Addr, error) {
	var all []netip.Addr
	err := r.await(ctx, "this node's address", func() error {
		o, err := r.ownNode(ctx)
		if err == nil {
			all, err = r.keys.nodeAddrs(o)
		}
		return err
	})
	return all, err
}

// await repeats try until it succeeds, and reports what it waits for.
func (r *Registry) await(ctx context.Context, what string, try func() error) error {
	var pause subnet.Backoff
	var reminded subnet.Reminder
	for {
		err := try()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("wait for %s: %w", what, err)
		}
		r.opts.Waiting("waiting for " + what + ": " + err.Error())
		if reminded.Due() {
			r.log.Warn("waiting for "+what, "node", r.opts.Node, "error", err)
		}
		if pause.Wait(ctx, retryAfter(err)) != nil {
			return fmt.Errorf("wait for %s: %w", what, err)
		}
	}
}

// Acquire implements subnet.Registry. It waits until our Node has podCIDRs that
// fit the configuration, and writes its annotations.
func (r *Registry) Acquire(ctx context.Context, c subnet.Claim) (subnet.Lease, error) {
	done, err := r.nodeLock.Take(ctx)
	if err != nil {
		return subnet.Lease{}, err
	}
	defer done()
	var l subnet.Lease
	if err := r.await(ctx, "this node's subnet", func() (err error) {
		l, err = r.claim(ctx, c)
		return err
	}); err != nil {
		return subnet.Lease{}, err
	}
	r.copy.Allow()
	r.setHeld(l)
	return l, nil
}

// ownNode reads our Node.
func (r *Registry) ownNode(ctx context.Context) (*object, error) {
	o, err := r.c.node(ctx, r.opts.Node, "")
	if has(err, http.StatusNotFound) {
		err = fmt.Errorf("there is no Node %q: the kubelet has not registered it, or the name is wrong (NODE_NAME)", r.opts.Node)
	}
	return o, err
}

func (r *Registry) claim(ctx context.Context, c subnet.Claim) (subnet.Lease, error) {
	o, err := r.ownNode(ctx)
	if err != nil {
		return subnet.Lease{}, err
	}
	l, err := leaseFor(o, c)
	if err != nil {
		return subnet.Lease{}, err
	}
	return l, r.annotate(ctx, o, l, false)
}

// leaseFor returns the lease that a Node's podCIDRs give the claiming node.
func leaseFor(o *object, c subnet.Claim) (subnet.Lease, error) {
	cidrs, err := o.podCIDRs()
	if err != nil {
		return subnet.Lease{}, fmt.Errorf("the Node %s: %w", o.Metadata.Name, err)
	}
	if len(cidrs) == 0 {
		return subnet.Lease{}, fmt.Errorf("the Node %s has no podCIDR yet: kube-controller-manager assigns one if it runs with --allocate-node-cidrs and --cluster-cidr (kubeadm: --pod-network-cidr)", o.Metadata.Name)
	}
	l := subnet.Lease{
		Node: c.Node, Backend: c.Config.Backend.Type,
		CreateRevision: o.Metadata.CreationTimestamp.Unix(), ModRevision: revision(o.Metadata.ResourceVersion),
	}
	for i, n := range c.Config.Networks {
		e := c.Ends[i]
		for _, p := range cidrs {
			if p.Addr().Is4() == n.Prefix.Addr().Is4() {
				e.Subnet = p
			}
		}
		if !e.Subnet.IsValid() {
			return subnet.Lease{}, fmt.Errorf("none of the podCIDRs %[2]v of the Node %[1]s is of the family of the network %[3]s: run kube-controller-manager with a --cluster-cidr of each family", o.Metadata.Name, cidrs, n.Prefix)
		}
		l.Endpoints = append(l.Endpoints, e)
	}
	if err := c.Config.Admits(l); err != nil {
		return subnet.Lease{}, fmt.Errorf("the podCIDRs %v of the Node %s do not fit net-conf.json: %w; its Network and kube-controller-manager's --cluster-cidr must be the same", cidrs, o.Metadata.Name, err)
	}
	return l, nil
}

// annotate writes the lease to our Node's annotations and, if up is set, the
// condition NetworkUnavailable=False.
func (r *Registry) annotate(ctx context.Context, o *object, l subnet.Lease, up bool) error {
	f, err := r.keys.facts(o)
	if err != nil {
		return err
	}
	want, err := r.keys.annotations(l, f)
	if err != nil {
		return err
	}
	p, changed := newPatch(o, want)
	if up && r.opts.NetworkUnavailable {
		changed = p.networkUp(o, time.Now()) || changed
	}
	if !changed {
		return nil
	}
	if err := r.c.patchStatus(ctx, r.opts.Node, p); err != nil {
		return err
	}
	r.log.Info("wrote our Node's annotations", "node", r.opts.Node, "subnet", l.Key(), "public", want[r.keys.public], "public6", want[r.keys.publicV6])
	return nil
}

const (
	// verifyEvery is how often Hold verifies our Node even if Watch reports no
	// change to it.
	verifyEvery = time.Minute
	// orphanEvery is the interval while our Node does not exist.
	orphanEvery = 5 * time.Second
)

// Hold implements subnet.Registry. It retries while the API server is unreachable:
// the lease is lost only if the API server answers that our Node has other
// podCIDRs, or that another Node has ours while our Node does not exist.
func (r *Registry) Hold(ctx context.Context, l subnet.Lease) error {
	if held, ok := r.Held(); !ok || held.Key() != l.Key() {
		r.setHeld(l)
	}
	var pause subnet.Backoff
	away := r.outage("node", r.opts.Node)
	wasUID := ""
	for {
		uid, err := r.verify(ctx, wasUID)
		wait := verifyEvery/2 + rand.N(verifyEvery)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, subnet.ErrLost):
			r.Forget()
			return err
		case errors.Is(err, errOrphan):
			away.Over()
			pause.Reset()
			r.log.Warn("the lease is in doubt; adding no new pods", "subnet", l.Key(), "reason", err)
			wait = orphanEvery
		case err != nil:
			away.Failed("cannot verify our Node; keeping its subnet and retrying", err)
			r.reportFailure(err)
			if pause.Wait(ctx, retryAfter(err)) != nil {
				return nil
			}
			continue
		default:
			away.Over()
			pause.Reset()
			wasUID = uid
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-r.verifyNow:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// errOrphan means that our Node does not exist or has no podCIDR yet.
var errOrphan = errors.New("this node's Node does not exist")

func (r *Registry) verify(ctx context.Context, wasUID string) (string, error) {
	done, err := r.nodeLock.Take(ctx)
	if err != nil {
		return "", err
	}
	defer done()
	held, ok := r.Held()
	if !ok {
		return "", fmt.Errorf("%w: it was released", subnet.ErrLost)
	}
	return r.repair(ctx, held, wasUID)
}

// repair makes our Node's annotations match the lease and returns its UID. If it
// differs from wasUID, the Node is new and its condition is set too. The caller
// holds nodeLock.
func (r *Registry) repair(ctx context.Context, want subnet.Lease, wasUID string) (string, error) {
	o, err := r.c.node(ctx, r.opts.Node, "")
	if has(err, http.StatusNotFound) {
		return "", r.orphaned(want, fmt.Sprintf("there is no Node %s in the cluster: restart its kubelet to register it again", r.opts.Node))
	}
	if err != nil {
		return "", err
	}
	cidrs, err := o.podCIDRs()
	if err != nil {
		return "", fmt.Errorf("the Node %s: %w", r.opts.Node, err)
	}
	if len(cidrs) == 0 {
		return "", r.orphaned(want, fmt.Sprintf("the Node %s was recreated and has no podCIDR yet", r.opts.Node))
	}
	if slices.ContainsFunc(want.Subnets(), func(p netip.Prefix) bool { return !slices.Contains(cidrs, p) }) {
		return "", fmt.Errorf("%w: the Node %s now has the podCIDRs %v, but the pods on this host use %v", subnet.ErrLost, r.opts.Node, cidrs, want.Subnets())
	}
	if err := r.annotate(ctx, o, want, o.Metadata.UID != wasUID); err != nil {
		return "", err
	}
	want.CreateRevision, want.ModRevision = o.Metadata.CreationTimestamp.Unix(), revision(o.Metadata.ResourceVersion)
	if !want.Expires.IsZero() {
		r.log.Info("our Node exists again, with the same podCIDRs", "node", r.opts.Node, "subnet", want.Key())
		want.Expires = time.Time{}
	}
	r.setHeld(want)
	return o.Metadata.UID, nil
}

// orphaned records since when the subnet is in doubt. New pods get no address from
// it; existing pods keep theirs until another Node has the subnet.
func (r *Registry) orphaned(l subnet.Lease, why string) error {
	if l.Expires.IsZero() {
		l.Expires = time.Now()
		r.setHeld(l)
	}
	r.mu.Lock()
	m := r.mirror
	r.mu.Unlock()
	if m != nil {
		if who := m.owner(l); who != "" {
			return fmt.Errorf("%w: %s, and %s now has its subnet", subnet.ErrLost, why, who)
		}
	}
	return fmt.Errorf("%w: %s", errOrphan, why)
}

// reportFailure makes a running Watch yield the error.
func (r *Registry) reportFailure(err error) {
	r.mu.Lock()
	m := r.mirror
	r.mu.Unlock()
	if m != nil {
		m.fail(err)
	}
}

// Update implements subnet.Registry. It does not change the subnets and retries
// while the API server is unreachable.
func (r *Registry) Update(ctx context.Context, l subnet.Lease) (subnet.Lease, error) {
	done, err := r.nodeLock.Take(ctx)
	if err != nil {
		return subnet.Lease{}, err
	}
	defer done()
	held, ok := r.Held()
	if !ok || held.Key() != l.Key() {
		return subnet.Lease{}, fmt.Errorf("update lease %s: %w: this registry does not hold it", l, subnet.ErrLost)
	}
	held.Backend, held.Endpoints = l.Backend, slices.Clone(l.Endpoints)
	if _, err := held.Value(); err != nil {
		return subnet.Lease{}, fmt.Errorf("update: %w", err)
	}
	r.setHeld(held)
	var pause subnet.Backoff
	for {
		_, err := r.repair(ctx, held, "")
		if err == nil || errors.Is(err, errOrphan) { // Hold writes it once our Node exists again
			after, _ := r.Held()
			return after, nil
		}
		if errors.Is(err, subnet.ErrLost) || pause.Wait(ctx, retryAfter(err)) != nil {
			return subnet.Lease{}, fmt.Errorf("update lease %s: %w", l, err)
		}
	}
}

// Release implements subnet.Registry. It removes our annotations, so that no peer
// sends to this node. The Node keeps its podCIDRs.
func (r *Registry) Release(ctx context.Context, l subnet.Lease) error {
	done, err := r.nodeLock.Take(ctx)
	if err != nil {
		return err
	}
	defer done()
	r.Forget()
	var pause subnet.Backoff
	for {
		err := r.removeAnnotations(ctx)
		if err == nil || has(err, http.StatusNotFound) {
			break
		}
		if pause.Wait(ctx, retryAfter(err)) != nil {
			return fmt.Errorf("release lease %s: %w", l, err)
		}
	}
	r.setHeld(subnet.Lease{})
	r.verifyNow.Raise()
	return nil
}

func (r *Registry) removeAnnotations(ctx context.Context) error {
	o, err := r.c.node(ctx, r.opts.Node, "")
	if err != nil {
		return err
	}
	if p, changed := r.keys.removeAnnotations(o); changed {
		return r.c.patchStatus(ctx, r.opts.Node, p)
	}
	return nil
}

// TakenBy describes who has the subnets if this node does not any more: our Node
// has other podCIDRs, or another Node has one of the subnets. It is empty
// otherwise. It retries while the API server is unreachable.
func (r *Registry) TakenBy(ctx context.Context, node string, _ []netip.Addr, subnets []netip.Prefix) (string, error) {
	var pause subnet.Backoff
	away := r.outage("node", node)
	for {
		who, err := r.takenBy(ctx, node, subnets)
		if err == nil {
			away.Over()
			return who, nil
		}
		if ctx.Err() != nil {
			return "", err
		}
		away.Failed("cannot read which node holds our subnet; retrying", err)
		r.opts.Waiting("checking with the API server whether this node still has the subnet of its pods: " + err.Error())
		if err := pause.Wait(ctx, retryAfter(err)); err != nil {
			return "", err
		}
	}
}

func (r *Registry) takenBy(ctx context.Context, node string, subnets []netip.Prefix) (string, error) {
	o, err := r.c.node(ctx, node, "")
	if err != nil && !has(err, http.StatusNotFound) {
		return "", err
	}
	if err == nil {
		cidrs, err := o.podCIDRs()
		if err != nil {
			return "", fmt.Errorf("the Node %s: %w", node, err)
		}
		if len(cidrs) > 0 {
			for _, s := range subnets {
				if !slices.Contains(cidrs, s) {
					return fmt.Sprintf("the Node %s now has the podCIDRs %v", node, cidrs), nil
				}
			}
			return "", nil
		}
	}
	who := ""
	_, err = r.c.list(ctx, whole, nil, func(o *object) {
		cidrs, err := o.podCIDRs()
		if err == nil && o.Metadata.Name != node && slices.ContainsFunc(cidrs, func(p netip.Prefix) bool { return slices.ContainsFunc(subnets, p.Overlaps) }) {
			who = fmt.Sprintf("the Node %s has the podCIDRs %v", o.Metadata.Name, cidrs)
		}
	})
	return who, err
}

// outage returns an Outage that logs with the given attributes.
func (r *Registry) outage(attributes ...any) *subnet.Outage {
	return subnet.NewOutage(r.log.With(attributes...), "the API server answers again")
}
