package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"culvert/internal/api"
	"culvert/internal/handover"
	"culvert/internal/host"
	"culvert/internal/httpd"
	"culvert/subnet"
)

// takeover is the successor's side of a handover (--replace):
//
//	ask ── offer ── begin, open ── first snapshot ── take ── yours ── apply ── running
//	                 (the running daemon carries)            (nobody reads)
//
// If the running daemon ends early, this one goes on. If it sends `back`, this one
// ends.
type takeover struct {
	conn     *handover.Conn
	offer    handover.Message
	datapath []int         // descriptors, until they are inherited
	yours    chan struct{} // closed when the running daemon has stopped carrying
	gone     chan struct{} // closed when it has ended
	taken    bool          // it has stopped carrying, or has ended
	finished atomic.Bool
	status   api.Handover
}

// takenBack stops this successor: the running daemon goes on.
type takenBack struct{ why string }

func (e takenBack) Error() string {
	return "the running daemon goes on instead of this one: " + e.why
}

// replace asks the running daemon for its sockets and adopts them. If none runs,
// it is a normal start (openSockets).
func (d *node) replace(ctx context.Context, abort context.CancelCauseFunc) error {
	o := d.options
	asking, cancel := context.WithTimeout(ctx, handoverTimeout)
	defer cancel()
	conn, offer, err := handover.Ask(asking, api.SocketPath(o.RunDir), handover.Message{Program: o.Version, PID: o.owner().PID})
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, handover.ErrEnded) {
		o.Log.Info("--replace: no daemon runs with this run directory", "run_dir", o.RunDir)
		return d.openSockets(ctx)
	}
	if err != nil {
		return fmt.Errorf("--replace: %w", err)
	}
	t := &takeover{conn: conn, offer: offer, yours: make(chan struct{}), gone: make(chan struct{})}
	t.status = api.Handover{PID: offer.PID, Version: offer.Program}
	d.takeover = t
	if err := d.inheritSockets(conn.TakeDescriptors()); err != nil {
		return fmt.Errorf("--replace: %w", err)
	}
	o.Log.Info("taking over from the running daemon", "pid", offer.PID, "version", offer.Program, "carrying", offer.Carrying)
	go t.listen(abort)
	if !offer.Carrying {
		// No datapath runs: take over before this one is ready.
		if err := t.take(ctx, false); err != nil {
			return err
		}
		return d.completeTakeover()
	}
	return nil
}

// inheritSockets takes ownership of the passed descriptors, by name.
func (d *node) inheritSockets(fds []int) error {
	t, p := d.takeover, &d.sockets
	named := make(map[string][]int)
	if len(fds) != len(t.offer.Descriptors) {
		closeAll(fds)
		return fmt.Errorf("the running daemon names %d descriptors and passed %d", len(t.offer.Descriptors), len(fds))
	}
	for i, name := range t.offer.Descriptors {
		named[name] = append(named[name], fds[i])
	}
	for _, name := range []string{"owner", "lock", "socket"} {
		if len(named[name]) != 1 {
			closeAll(fds)
			return fmt.Errorf("the running daemon passed no %s", name)
		}
	}
	// The running daemon uses them until completeTakeover.
	p.passed = true
	var err error
	if p.owner, err = host.InheritOwnership(named["owner"][0], d.options.owner()); err != nil {
		return err
	}
	p.socket = api.Inherit(d.options.RunDir, named["lock"][0], named["socket"][0])
	p.api = httpd.New(named["socket"][0], d.socketHandler(), d.log)
	t.datapath = named["datapath"]
	metrics := named["metrics"]
	if d.options.Metrics != t.offer.Metrics {
		closeAll(metrics)
		metrics = nil
		if d.options.Metrics != "" {
			fd, err := listenMetrics(d.options.Metrics)
			if err != nil {
				return err
			}
			metrics = []int{fd}
		}
	}
	if len(metrics) == 1 {
		if p.metrics, err = d.metricsService(metrics[0]); err != nil {
			return err
		}
	}
	return nil
}

// listen handles the running daemon's messages until the connection ends.
func (t *takeover) listen(abort context.CancelCauseFunc) {
	defer close(t.gone)
	defer t.conn.Close()
	said := false
	for m := range t.conn.Messages() {
		switch {
		case m.Step == handover.Back:
			abort(takenBack{m.Why})
		case m.Step == handover.Yours && !said:
			said = true
			close(t.yours)
		}
	}
}

// take tells the running daemon to stop carrying, and waits until it has stopped or
// ended. Later calls do nothing.
func (t *takeover) take(ctx context.Context, inherit bool) error {
	if t == nil || t.taken {
		return nil
	}
	if err := t.conn.Send(handover.Message{Step: handover.Take, Inherit: inherit}); err != nil {
		// It has ended, or sent `back`, which listen handles.
		select {
		case <-t.gone:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	select {
	case <-t.yours:
	case <-t.gone:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	t.taken = true
	return context.Cause(ctx)
}

// pending reports whether the running daemon can still take the node back.
func (t *takeover) pending() bool {
	if t == nil || t.finished.Load() {
		return false
	}
	select {
	case <-t.gone:
		return false
	default:
		return true
	}
}

// completeTakeover completes the takeover once this daemon runs: it starts serving, and the
// running daemon ends.
func (d *node) completeTakeover() error {
	t := d.takeover
	if t == nil || !t.finished.CompareAndSwap(false, true) {
		return nil
	}
	t.status.At = time.Now()
	d.state.change(func(s *api.Status) { s.Handover = &t.status })
	p := &d.sockets
	p.passed = false
	p.socket.Sign()
	if err := errors.Join(p.owner.Answer(), p.serve()); err != nil {
		return fmt.Errorf("taking over from the running daemon: %w", err)
	}
	_ = t.conn.Send(handover.Message{Step: handover.Running}) // it may have ended
	d.log.Info("took over from the running daemon", "pid", t.offer.PID, "version", t.offer.Program,
		"datapath_inherited", t.status.Inherited, "why_not", t.status.Why)
	return nil
}

// inherit returns the descriptors of the running daemon's datapath if this daemon's
// has the same facts. Otherwise it logs why not and has that datapath closed first,
// since the two would conflict.
func (d *node) inherit(ctx context.Context, facts map[string]string) ([]int, error) {
	t := d.takeover
	if t == nil || t.taken {
		return nil, nil
	}
	fds := t.datapath
	t.datapath = nil
	why := differences(t.offer.Datapath, facts)
	if why == "" {
		t.status.Inherited = true
		return fds, nil
	}
	t.status.Why = why
	d.log.Warn("reopening the datapath instead of inheriting it: packets are lost for a moment", "because", why)
	closeAll(fds)
	return nil, t.take(ctx, false)
}

// differences describes how a datapath's facts changed; "" if they did not.
func differences(before, now map[string]string) string {
	var all []string
	for _, name := range slices.Sorted(maps.Keys(now)) {
		if before[name] != now[name] {
			all = append(all, fmt.Sprintf("%s is %s (was %s)", name, now[name], before[name]))
		}
	}
	return strings.Join(all, "; ")
}

// datapathFacts are a datapath's parameters. If they are equal, a successor can inherit
// the descriptors.
func (d *node) datapathFacts(kind Datapath, c subnet.Config, l subnet.Lease, u host.Underlay) map[string]string {
	facts := map[string]string{
		"node": d.options.Node, "store": fmt.Sprint(d.options.describeStore()),
		"datapath": string(kind), "backend": fmt.Sprintf("%+v", c.Backend),
		"subnets": fmt.Sprint(l.Subnets()), "underlay": fmt.Sprint(u.Index, u.Addrs), "addresses": fmt.Sprint(l.Publics()),
	}
	if kind == Userspace {
		facts["tunnel"] = d.options.Tunnel.Shape()
	}
	return facts
}
