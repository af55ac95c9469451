package etcd

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"culvert/subnet"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A freed subnet is quarantined. Next to each lease there is a mark, under a key
// that flannel does not read. Its etcd lease is renewed with the lease and
// outlives it by the quarantine:
//
//	<prefix>/subnets/10.5.52.0-24        expires --lease-ttl after the last renewal
//	<prefix>/culvert/used/10.5.52.0-24   expires --lease-ttl plus --quarantine after it
//
// A mark without a lease is a subnet in quarantine. So no process has to notice that a
// lease expired, only etcd's clock matters, and nothing needs to be cleaned up. The mark
// is an optimization: without it a subnet is free at once.

// markValue is a mark's JSON.
type markValue struct {
	NodeID string
}

func (r *Registry) marksDir() string { return r.opts.Prefix + "/culvert/used/" }

// quarantineLookups limits how many marks are queried for their time to live in one
// search for the longest unused subnet.
const quarantineLookups = 512

// marks lists the marks; none if there is no quarantine.
func (r *Registry) marks(ctx context.Context) ([]*mvccpb.KeyValue, error) {
	if r.opts.Quarantine <= 0 {
		return nil, nil
	}
	rctx, cancel := r.request(ctx)
	defer cancel()
	resp, err := r.client.Get(rctx, r.marksDir(), clientv3.WithPrefix())
	if err != nil {
		return nil, fmt.Errorf("list the quarantine marks: %w", err)
	}
	return resp.Kvs, nil
}

// mark is a subnet in quarantine.
type mark struct {
	key, node string
	subnets   []netip.Prefix
	id        int64
}

// quarantined returns the marks that have no lease and are not the node's own. The
// marks must have been listed before the entries.
func quarantined(marks []*mvccpb.KeyValue, entries []subnet.Entry, node string) []mark {
	leased := make(map[string]bool, len(entries))
	for _, e := range entries {
		leased[e.Key] = true
	}
	var out []mark
	for _, kv := range marks {
		m := mark{key: string(kv.Key[strings.LastIndexByte(string(kv.Key), '/')+1:]), id: kv.Lease}
		var v markValue
		var err error
		if m.subnets, err = subnet.ParseKey(m.key); err != nil || leased[m.key] || json.Unmarshal(kv.Value, &v) != nil {
			continue
		}
		if m.node = v.NodeID; node == "" || m.node != node {
			out = append(out, m)
		}
	}
	return out
}

// choose is subnet.Choose. It asks etcd for the order of the subnets in quarantine
// only if one of them has to be used.
func (r *Registry) choose(ctx context.Context, c subnet.Claim, o subnet.Occupancy, marks []mark) (subnet.Choice, error) {
	for _, m := range marks {
		o.Quarantined = append(o.Quarantined, m.subnets...)
	}
	choice, err := subnet.Choose(c, o)
	if err != nil || choice.Keep != nil || !slices.ContainsFunc(o.Quarantined, func(p netip.Prefix) bool {
		return slices.ContainsFunc(choice.Lease.Subnets(), p.Overlaps)
	}) {
		return choice, err
	}
	rests, err := r.quarantineEnds(ctx, marks)
	if err != nil {
		return subnet.Choice{}, err
	}
	o.Quarantined = nil
	for _, rest := range rests {
		subnets, _ := subnet.ParseKey(rest.Key) // validated by quarantined
		o.Quarantined = append(o.Quarantined, subnets...)
	}
	r.log.Info("all free subnets are in quarantine; using the longest unused one", "resting", len(rests), "quarantine", r.opts.Quarantine)
	return subnet.Choose(c, o)
}

// quarantineEnds returns the marks sorted by the end of their quarantine, which is the
// order in which they were freed.
func (r *Registry) quarantineEnds(ctx context.Context, marks []mark) ([]subnet.QuarantinedSubnet, error) {
	var rests []subnet.QuarantinedSubnet
	for i, m := range marks {
		rest := subnet.QuarantinedSubnet{Key: m.key, Node: m.node}
		if i < quarantineLookups {
			var err error
			if rest.Until, _, err = r.timeToLive(ctx, m.id); err != nil {
				return nil, err
			}
		} else {
			rest.Until = time.Now().Add(r.opts.Quarantine)
		}
		rests = append(rests, rest)
	}
	slices.SortStableFunc(rests, func(a, b subnet.QuarantinedSubnet) int { return a.Until.Compare(b.Until) })
	return rests, nil
}

// keepMark renews the mark of the held lease, or creates it. A failure is retried
// with the next renewal.
func (r *Registry) keepMark(ctx context.Context, held subnet.Lease) {
	if r.opts.Quarantine <= 0 || held.ID == 0 {
		return
	}
	if r.markLease != 0 {
		rctx, cancel := r.request(ctx)
		_, err := r.client.KeepAliveOnce(rctx, clientv3.LeaseID(r.markLease))
		cancel()
		if err == nil || !expired(err) {
			return
		}
		r.markLease = 0
	}
	if err := r.makeMark(ctx, held); err != nil && ctx.Err() == nil {
		r.log.Debug("cannot write the quarantine mark of our subnet", "subnet", held.Key(), "error", err)
	}
}

// makeMark adopts the existing mark, or writes one if the lease is still ours.
func (r *Registry) makeMark(ctx context.Context, held subnet.Lease) error {
	rctx, cancel := r.request(ctx)
	defer cancel()
	key, life := r.marksDir()+held.Key(), r.lifetime()+r.opts.Quarantine
	resp, err := r.client.Get(rctx, key)
	if err != nil {
		return err
	}
	value, err := json.Marshal(markValue{NodeID: held.Node})
	if err != nil {
		return err
	}
	if len(resp.Kvs) == 1 && resp.Kvs[0].Lease != 0 && string(resp.Kvs[0].Value) == string(value) {
		ends, whole, err := r.timeToLive(ctx, resp.Kvs[0].Lease)
		if err != nil {
			return err
		}
		if !ends.IsZero() && whole == time.Duration(seconds(life))*time.Second {
			r.markLease = resp.Kvs[0].Lease
			_, err := r.client.KeepAliveOnce(rctx, clientv3.LeaseID(r.markLease))
			return err
		}
	}
	lease, err := r.client.Grant(rctx, seconds(life))
	if err != nil {
		return err
	}
	lkey := r.subnetsDir() + held.Key()
	done, err := r.client.Txn(rctx).
		If(clientv3.Compare(clientv3.CreateRevision(lkey), "=", held.CreateRevision)).
		Then(clientv3.OpPut(key, string(value), clientv3.WithLease(lease.ID))).Commit()
	if err != nil || !done.Succeeded {
		r.revoke(int64(lease.ID))
		return err
	}
	r.markLease = int64(lease.ID)
	return nil
}

// quarantineOps returns the operations that start the quarantine, for the transaction
// that frees a subnet; none if there is no quarantine.
func (r *Registry) quarantineOps(ctx context.Context, key, node string) ([]clientv3.Op, error) {
	if r.opts.Quarantine <= 0 {
		return nil, nil
	}
	rctx, cancel := r.request(ctx)
	defer cancel()
	lease, err := r.client.Grant(rctx, seconds(r.opts.Quarantine))
	if err != nil {
		return nil, fmt.Errorf("grant the quarantine's etcd lease: %w", err)
	}
	value, err := json.Marshal(markValue{NodeID: node})
	if err != nil {
		return nil, err
	}
	return []clientv3.Op{clientv3.OpPut(r.marksDir()+key, string(value), clientv3.WithLease(lease.ID))}, nil
}
