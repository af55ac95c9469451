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

// A freed subnet rests. Beside each lease stands a mark, where flannel does not
// look, whose own etcd lease is renewed with it and outlives it by the
// quarantine:
//
//	<prefix>/subnets/10.5.52.0-24        lives for --lease-ttl without renewal
//	<prefix>/culvert/used/10.5.52.0-24   lives for --lease-ttl and --quarantine
//
// A mark without its lease is a subnet at rest. So nobody has to notice that a
// lease ran out, no clock but etcd's counts, and nothing is left to clean up.
// A mark is an aid: without it a subnet is free at once, and nothing is lost.

// markValue is a mark's JSON.
type markValue struct {
	NodeID string
}

func (r *Registry) usedDir() string { return r.opts.Prefix + "/culvert/used/" }

// restLimit bounds how many marks are asked for their time to live, in one
// search for the longest unused.
const restLimit = 512

// marks lists the marks; none without a quarantine.
func (r *Registry) marks(ctx context.Context) ([]*mvccpb.KeyValue, error) {
	if r.opts.Quarantine <= 0 {
		return nil, nil
	}
	rctx, cancel := r.request(ctx)
	defer cancel()
	resp, err := r.client.Get(rctx, r.usedDir(), clientv3.WithPrefix())
	if err != nil {
		return nil, fmt.Errorf("list the subnets that were used: %w", err)
	}
	return resp.Kvs, nil
}

// mark is a subnet at rest.
type mark struct {
	key, node string
	subnets   []netip.Prefix
	id        int64
}

// resting returns the marks, listed before the entries, that have no lease, and
// are not the node's own.
func resting(marks []*mvccpb.KeyValue, entries []subnet.Entry, node string) []mark {
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

// choose is subnet.Choose; only where it must fall back on a subnet at rest is
// etcd asked which one has rested longest.
func (r *Registry) choose(ctx context.Context, c subnet.Claim, o subnet.Occupancy, marks []mark) (subnet.Choice, error) {
	for _, m := range marks {
		o.Resting = append(o.Resting, m.subnets...)
	}
	choice, err := subnet.Choose(c, o)
	if err != nil || choice.Keep != nil || !slices.ContainsFunc(o.Resting, func(p netip.Prefix) bool {
		return slices.ContainsFunc(choice.Lease.Subnets(), p.Overlaps)
	}) {
		return choice, err
	}
	rests, err := r.restUntil(ctx, marks)
	if err != nil {
		return subnet.Choice{}, err
	}
	o.Resting = nil
	for _, rest := range rests {
		subnets, _ := subnet.ParseKey(rest.Key) // parsed before
		o.Resting = append(o.Resting, subnets...)
	}
	r.log.Info("no subnet is free that was not used within the quarantine; taking the longest unused", "resting", len(rests), "quarantine", r.opts.Quarantine)
	return subnet.Choose(c, o)
}

// restUntil returns the marks in the order in which their rest ends, which is
// the order in which they were freed.
func (r *Registry) restUntil(ctx context.Context, marks []mark) ([]subnet.Rest, error) {
	var rests []subnet.Rest
	for i, m := range marks {
		rest := subnet.Rest{Key: m.key, Node: m.node}
		if i < restLimit {
			var err error
			if rest.Until, _, err = r.timeToLive(ctx, m.id); err != nil {
				return nil, err
			}
		} else {
			rest.Until = time.Now().Add(r.opts.Quarantine)
		}
		rests = append(rests, rest)
	}
	slices.SortStableFunc(rests, func(a, b subnet.Rest) int { return a.Until.Compare(b.Until) })
	return rests, nil
}

// keepMark renews the mark of the lease that we hold, and makes it if it is not
// there. What fails here is tried again with the next renewal.
func (r *Registry) keepMark(ctx context.Context, held subnet.Lease) {
	if r.opts.Quarantine <= 0 || held.ID == 0 {
		return
	}
	if r.mark != 0 {
		rctx, cancel := r.request(ctx)
		_, err := r.client.KeepAliveOnce(rctx, clientv3.LeaseID(r.mark))
		cancel()
		if err == nil || !expired(err) {
			return
		}
		r.mark = 0
	}
	if err := r.makeMark(ctx, held); err != nil && ctx.Err() == nil {
		r.log.Debug("the mark of our subnet could not be written", "subnet", held.Key(), "error", err)
	}
}

// makeMark adopts the mark that is there, or writes it while the lease is ours.
func (r *Registry) makeMark(ctx context.Context, held subnet.Lease) error {
	rctx, cancel := r.request(ctx)
	defer cancel()
	key, life := r.usedDir()+held.Key(), r.lifetime()+r.opts.Quarantine
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
			r.mark = resp.Kvs[0].Lease
			_, err := r.client.KeepAliveOnce(rctx, clientv3.LeaseID(r.mark))
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
	r.mark = int64(lease.ID)
	return nil
}

// restOps is what goes into the transaction that frees a subnet, for it to rest
// from now on: nothing without a quarantine.
func (r *Registry) restOps(ctx context.Context, key, node string) ([]clientv3.Op, error) {
	if r.opts.Quarantine <= 0 {
		return nil, nil
	}
	rctx, cancel := r.request(ctx)
	defer cancel()
	lease, err := r.client.Grant(rctx, seconds(r.opts.Quarantine))
	if err != nil {
		return nil, fmt.Errorf("grant the quarantine: %w", err)
	}
	value, err := json.Marshal(markValue{NodeID: node})
	if err != nil {
		return nil, err
	}
	return []clientv3.Op{clientv3.OpPut(r.usedDir()+key, string(value), clientv3.WithLease(lease.ID))}, nil
}
