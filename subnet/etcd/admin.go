package etcd

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"culvert/subnet"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Entries implements subnet.Admin.
func (r *Registry) Entries(ctx context.Context, withExpiry bool) ([]subnet.Entry, int64, error) {
	entries, revision, err := r.entries(ctx)
	if err != nil {
		return nil, 0, err
	}
	if !withExpiry {
		return entries, revision, nil
	}
	for i, e := range entries {
		if e.ID == 0 {
			continue
		}
		if e.Expires, e.Lifetime, err = r.timeToLive(ctx, e.ID); err != nil {
			return nil, 0, err
		}
		entries[i] = subnet.NewEntry(e)
	}
	return entries, revision, nil
}

// ConfigText implements subnet.Admin.
func (r *Registry) ConfigText(ctx context.Context) ([]byte, int64, error) {
	text, revision, _, err := r.configText(ctx)
	return text, revision, err
}

// SetConfig implements subnet.Admin.
func (r *Registry) SetConfig(ctx context.Context, text []byte, replaces int64) (int64, error) {
	if _, _, err := subnet.ParseConfig(text); err != nil {
		return 0, fmt.Errorf("set the network configuration: %w", err)
	}
	var ifs []clientv3.Cmp
	if replaces != subnet.AnyRevision {
		ifs = append(ifs, clientv3.Compare(clientv3.ModRevision(r.configKey()), "=", replaces))
	}
	rctx, cancel := r.request(ctx)
	defer cancel()
	resp, err := r.client.Txn(rctx).If(ifs...).Then(clientv3.OpPut(r.configKey(), string(text))).Commit()
	switch {
	case err != nil:
		return 0, fmt.Errorf("set the network configuration: %w", err)
	case !resp.Succeeded:
		return 0, fmt.Errorf("set the network configuration at revision %d: %w", replaces, subnet.ErrChanged)
	}
	return resp.Header.Revision, nil
}

// Reserve implements subnet.Admin. The entry has no etcd lease, so that it never
// expires, and no backend type, so that it is no peer.
func (r *Registry) Reserve(ctx context.Context, owner string, subnets []netip.Prefix) (subnet.Lease, error) {
	l := subnet.Lease{Node: owner, Reserved: true}
	for _, s := range subnets {
		l.Endpoints = append(l.Endpoints, subnet.Endpoint{Subnet: s})
	}
	value, err := l.Value()
	if err != nil {
		return subnet.Lease{}, fmt.Errorf("reserve: %w", err)
	}
	entries, listed, err := r.entries(ctx)
	if err != nil {
		return subnet.Lease{}, fmt.Errorf("reserve: %w", err)
	}
	for _, e := range entries {
		taken, err := subnet.ParseKey(e.Key)
		if err != nil {
			continue
		}
		for _, s := range subnets {
			if slices.ContainsFunc(taken, s.Overlaps) {
				return subnet.Lease{}, fmt.Errorf("reserve %s: %w: %s", s, subnet.ErrTaken, e.Key)
			}
		}
	}
	key := r.subnetsDir() + l.Key()
	rctx, cancel := r.request(ctx)
	defer cancel()
	// The reservation's length may differ from the leases', so require that
	// nothing under subnets/ was written since the list.
	resp, err := r.client.Txn(rctx).
		If(r.stillFree(l, listed, true)...).
		Then(clientv3.OpPut(key, string(value))).Commit()
	switch {
	case err != nil:
		return subnet.Lease{}, fmt.Errorf("reserve %s: %w", l.Key(), err)
	case !resp.Succeeded:
		return subnet.Lease{}, fmt.Errorf("reserve %s: %w; try again", l.Key(), subnet.ErrChanged)
	}
	l.CreateRevision, l.ModRevision = resp.Header.Revision, resp.Header.Revision
	return l, nil
}

// ReleaseKey implements subnet.Admin.
func (r *Registry) ReleaseKey(ctx context.Context, key string, at int64) error {
	full := r.subnetsDir() + key
	cond := clientv3.Compare(clientv3.CreateRevision(full), ">", 0)
	if at != subnet.AnyRevision {
		cond = clientv3.Compare(clientv3.ModRevision(full), "=", at)
	}
	rctx, cancel := r.request(ctx)
	defer cancel()
	var rest []clientv3.Op
	if now, err := r.client.Get(rctx, full); err != nil {
		return fmt.Errorf("release %s: %w", key, err)
	} else if len(now.Kvs) == 1 {
		// No node has used a reservation, so it needs no quarantine.
		if l, err := r.entry(now.Kvs[0]).Lease(); err == nil && !l.Reserved {
			if rest, err = r.quarantineOps(ctx, key, l.Node); err != nil {
				return fmt.Errorf("release %s: %w", key, err)
			}
		}
	}
	resp, err := r.client.Txn(rctx).If(cond).
		Then(append(rest, clientv3.OpDelete(full))...).
		Else(clientv3.OpGet(full, clientv3.WithCountOnly())).Commit()
	switch {
	case err != nil:
		return fmt.Errorf("release %s: %w", key, err)
	case resp.Succeeded:
		return nil
	case resp.Responses[0].GetResponseRange().Count == 0:
		return fmt.Errorf("release %s: %w", key, subnet.ErrAbsent)
	default:
		return fmt.Errorf("release %s: %w", key, subnet.ErrChanged)
	}
}

// Quarantined implements subnet.Admin.
func (r *Registry) Quarantined(ctx context.Context) ([]subnet.QuarantinedSubnet, error) {
	marks, err := r.marks(ctx)
	if err != nil {
		return nil, err
	}
	entries, _, err := r.entries(ctx)
	if err != nil {
		return nil, err
	}
	return r.quarantineEnds(ctx, quarantined(marks, entries, ""))
}
