package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"

	"culvert/internal/lab"
	"culvert/subnet"
)

// gateway writes to etcd through its JSON gateway.
type gateway struct {
	url    string
	client *http.Client
}

const (
	configKey      = "/coreos.com/network/config"
	leaseDirectory = "/coreos.com/network/subnets/"
)

// startEtcd runs etcd in the lab's fabric and writes the network configuration, which
// may be one for another program.
func startEtcd(ctx context.Context, l *lab.Lab, config string) (gateway, error) {
	g := gateway{client: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return l.Fabric.Dial(ctx, network, address)
		},
	}}}
	bin, err := lab.FindBin()
	if err != nil {
		return g, err
	}
	listen := netip.AddrPortFrom(l.FabricAddrs[0], 2379).String()
	store, err := l.Fabric.Start(lab.Command{
		Name: "etcd", Path: filepath.Join(bin, "culvert-etcd"),
		Args: []string{"--data-dir", filepath.Join(l.Dir, "etcd"), "--listen-client", listen, "--unsafe-no-fsync"},
	})
	if err != nil {
		return g, err
	}
	if _, err := store.WaitLine(ctx, "ready "); err != nil {
		return g, err
	}
	g.url = "http://" + listen
	return g, g.post(ctx, "/v3/kv/put", map[string]any{"key": []byte(configKey), "value": []byte(config)})
}

// put writes leases, in transactions of at most 128 operations, etcd's limit.
func (g gateway) put(ctx context.Context, leases ...subnet.Lease) error {
	const most = 128
	for some := range slices.Chunk(leases, most) {
		var puts []any
		for _, l := range some {
			value, err := l.Value()
			if err != nil {
				return err
			}
			puts = append(puts, map[string]any{"requestPut": map[string]any{
				"key": []byte(leaseDirectory + l.Key()), "value": value,
			}})
		}
		if err := g.post(ctx, "/v3/kv/txn", map[string]any{"success": puts}); err != nil {
			return err
		}
	}
	return nil
}

func (g gateway) remove(ctx context.Context, l subnet.Lease) error {
	return g.post(ctx, "/v3/kv/deleterange", map[string]any{"key": []byte(leaseDirectory + l.Key())})
}

func (g gateway) post(ctx context.Context, path string, body any) error {
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	q, err := http.NewRequestWithContext(ctx, http.MethodPost, g.url+path, bytes.NewReader(text))
	if err != nil {
		return err
	}
	a, err := g.client.Do(q)
	if err != nil {
		return fmt.Errorf("writing to etcd: %w", err)
	}
	defer a.Body.Close()
	text, err = io.ReadAll(io.LimitReader(a.Body, 1<<16))
	if err == nil && a.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", a.Status, bytes.TrimSpace(text))
	}
	if err != nil {
		return fmt.Errorf("writing to etcd: %w", err)
	}
	return nil
}
