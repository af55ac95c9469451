package etcd

import (
	"context"
	"fmt"
	"time"

	"culvert/subnet"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// askEvery is how often Config reads the configuration if etcd reports no change.
const askEvery = time.Minute

// HowToSetConfig is a command that sets a network configuration.
const HowToSetConfig = `culvert config set '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}'`

// Config implements subnet.Registry.
func (r *Registry) Config(ctx context.Context) (subnet.Config, error) {
	var pause subnet.Backoff
	var reminded subnet.Reminder
	unanswered := 0
	for {
		text, revision, at, err := r.configText(ctx)
		switch {
		case err != nil:
			if permanent(err) || ctx.Err() != nil {
				return subnet.Config{}, r.Explain(ctx, err)
			}
		case revision != 0:
			var cfg subnet.Config
			var warnings []subnet.Warning
			if cfg, warnings, err = subnet.ParseConfig(text); err == nil {
				for _, w := range warnings {
					r.log.Warn("network configuration", "key", w.Key, "warning", w.Message)
				}
				r.rememberConfig(cfg, string(text))
				return cfg, nil
			}
			err = fmt.Errorf("the network configuration in etcd is invalid: %w", err)
		default:
			err = fmt.Errorf("there is no network configuration at %s", r.configKey())
		}
		switch {
		case at == 0 && r.Trouble() != nil: // the caller that polls Trouble reports it
		case at == 0:
			if unanswered++; unanswered == 2 { // the reason may be known only after the first attempt
				r.log.Warn("waiting for etcd", "error", r.Explain(ctx, err))
			}
		case at != 0 && reminded.Due():
			r.log.Warn("waiting for a network configuration", "key", r.configKey(), "error", r.Explain(ctx, err), "set_it_with", HowToSetConfig)
		}
		if at != 0 { // etcd answered; wait for a change
			pause.Reset()
			unanswered = 0
			r.awaitConfig(ctx, at+1)
		}
		if err := pause.Wait(ctx, 0); err != nil {
			return subnet.Config{}, fmt.Errorf("wait for the network configuration: %w", err)
		}
	}
}

// awaitConfig returns when the key may have changed, at most after askEvery.
func (r *Registry) awaitConfig(ctx context.Context, revision int64) {
	wctx, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), askEvery)
	defer cancel()
	for resp := range r.client.Watch(wctx, r.configKey(), clientv3.WithRev(revision)) {
		if resp.Err() != nil || len(resp.Events) > 0 {
			return
		}
	}
}

func (r *Registry) rememberConfig(cfg subnet.Config, text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.config, r.text = cfg, text
}

// configText returns the configuration's text, its ModRevision (0 if there is
// none) and the store's revision.
func (r *Registry) configText(ctx context.Context) (text []byte, revision, at int64, err error) {
	rctx, cancel := r.request(ctx)
	defer cancel()
	resp, err := r.client.Get(rctx, r.configKey())
	if err != nil {
		return nil, 0, 0, fmt.Errorf("read the network configuration: %w", err)
	}
	if len(resp.Kvs) == 0 {
		return nil, 0, resp.Header.Revision, nil
	}
	return resp.Kvs[0].Value, resp.Kvs[0].ModRevision, resp.Header.Revision, nil
}
