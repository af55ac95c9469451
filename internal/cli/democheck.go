package cli

import (
	"context"
	"crypto/rand"
	"fmt"
	"math"
	mathrand "math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"culvert/internal/lab"
)

// pairs returns the directions to test: every pod to every other, and each node to and
// from the pods of other nodes.
func (d *demo) pairs() [][2]*demoEnd {
	var all [][2]*demoEnd
	for _, from := range d.ends {
		for _, to := range d.ends {
			if from == to || from.pod == nil && to.pod == nil ||
				(from.pod == nil || to.pod == nil) && from.node == to.node {
				continue
			}
			all = append(all, [2]*demoEnd{from, to})
		}
	}
	return all
}

// pingAll pings all pairs. The first contacts run in parallel; the measured pings follow
// one at a time, so that they include neither address resolution nor the load of others.
func (d *demo) pingAll(ctx context.Context) error {
	for _, e := range d.ends {
		c, err := e.ServeReflector(ctx, netip.AddrPortFrom(e.addr, reflectorPort))
		if err != nil {
			return err
		}
		defer c.Close()
	}
	pairs := d.pairs()
	d.Result.Pings = make([]demoPing, len(pairs))
	contacts := make([]error, len(pairs))

	deadline := time.Now().Add(firstContact)
	bySource := map[*demoEnd][]int{}
	for i, p := range pairs {
		bySource[p[0]] = append(bySource[p[0]], i)
	}
	var wg sync.WaitGroup
	for _, mine := range bySource {
		wg.Go(func() {
			for _, i := range mine {
				atMost := max(time.Until(deadline), pingAgain)
				_, contacts[i] = ping(ctx, pairs[i][0], pairs[i][1], atMost)
			}
		})
	}
	wg.Wait()

	reached := 0
	for i, p := range pairs {
		result := &d.Result.Pings[i]
		*result = demoPing{From: p[0].name, To: p[1].name, why: contacts[i]}
		if contacts[i] != nil || ctx.Err() != nil {
			continue
		}
		rtt, err := ping(ctx, p[0], p[1], pingAgain)
		if err != nil {
			result.why = err
			continue
		}
		own, seen, err := p[0].AskReflector(ctx, netip.AddrPortFrom(p[1].addr, reflectorPort))
		if err != nil {
			result.why = err
			continue
		}
		result.OK, result.NAT = true, own.Addr() != seen.Addr()
		result.RTTms = math.Round(rtt.Seconds()*1e6) / 1e3
		if result.NAT {
			result.why = fmt.Errorf("%s sent from %s, and %s saw %s", p[0].name, own.Addr(), p[1].name, seen.Addr())
		}
		reached++
	}
	d.progress.say("%d of %d pairs reached each other", reached, len(pairs))
	return ctx.Err()
}

func ping(ctx context.Context, from, to *demoEnd, atMost time.Duration) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, atMost)
	defer cancel()
	return from.Ping(ctx, netip.Addr{}, to.addr)
}

// transferAll sends data between the first pods of every two nodes in both directions,
// one transfer at a time.
func (d *demo) transferAll(ctx context.Context) error {
	if len(d.lab.Nodes) < 2 {
		return nil
	}
	first := map[string]*demoEnd{}
	for _, e := range d.ends {
		if e.pod != nil && first[e.node.ID] == nil {
			first[e.node.ID] = e
		}
	}
	payload, into := make([]byte, demoTransfer), make([]byte, demoTransfer)
	var seed [32]byte
	_, _ = rand.Read(seed[:]) // neither call fails
	_, _ = mathrand.NewChaCha8(seed).Read(payload)
	for _, from := range d.lab.Nodes {
		for _, to := range d.lab.Nodes {
			if from == to || ctx.Err() != nil {
				continue
			}
			flow := d.transfer(ctx, first[from.ID], first[to.ID], payload, into)
			d.Result.Transfers = append(d.Result.Transfers, flow)
			d.progress.say("%s to %s: %s", from.ID, to.ID, flow.cell())
		}
	}
	return ctx.Err()
}

func (d *demo) transfer(ctx context.Context, from, to *demoEnd, payload, into []byte) demoFlow {
	flow := demoFlow{From: from.node.ID, To: to.node.ID}
	if slices.ContainsFunc(d.Result.Pings, func(p demoPing) bool { return p.From == from.name && p.To == to.name && !p.OK }) {
		flow.why = fmt.Errorf("%s does not reach %s", from.name, to.name)
		return flow
	}
	clear(into)
	ctx, cancel := context.WithTimeout(ctx, transferTime)
	defer cancel()
	took, err := lab.Transfer(ctx, from.Namespace, to.Namespace, to.addr, payload, into)
	if err != nil {
		flow.why = err
		return flow
	}
	flow.OK = true
	flow.Gbps = math.Round(demoTransfer*8/took.Seconds()/1e6) / 1e3
	return flow
}

func (t demoFlow) cell() string {
	if !t.OK {
		return fmt.Sprintf("FAILED: %v", t.why)
	}
	return fmt.Sprintf("%d MB, SHA-256 matches, %.2f Gbit/s", demoTransfer/1_000_000, t.Gbps)
}
