package bench

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"culvert/bench/load"
)

// Workload is one kind of traffic.
type Workload struct {
	Name        string
	Title       string // shown on pages
	About       string // shown in help
	Streams     int    // number of TCP streams
	Reverse     bool   // the TCP stream goes from the far end to the near one
	Payload     int    // bytes per UDP datagram
	Requests    bool   // requests on one connection
	Connections bool   // a connection per request
	Loaded      bool   // requests while one TCP stream runs, which may be reverse
	Fair        bool   // measure the streams' shares
	Flood       int    // bytes per UDP datagram of a flood while the streams run
}

// Plain reports whether the workload is only streams or only datagrams.
func (w Workload) Plain() bool { return !w.Requests && !w.Connections && !w.Fair && w.Flood == 0 }

// mostStreams is the maximum number of streams per sender.
const mostStreams = 16

// Workloads returns the workloads in display order.
func Workloads() []Workload {
	return []Workload{
		{Name: "tcp1", Title: "TCP, 1 stream", About: "one TCP stream", Streams: 1},
		{Name: "tcp4", Title: "TCP, 4 streams", About: "four TCP streams", Streams: 4},
		{Name: "tcp16", Title: "TCP, 16 streams", About: "16 TCP streams", Streams: mostStreams},
		{Name: "tcp1-reverse", Title: "TCP, 1 stream, reverse", About: "one TCP stream from the end that listens", Streams: 1, Reverse: true},
		{Name: "udp64", Title: "UDP, 64 bytes", About: "UDP datagrams of 64 bytes", Payload: 64},
		{Name: "udp512", Title: "UDP, 512 bytes", About: "UDP datagrams of 512 bytes", Payload: 512},
		{Name: "udp1400", Title: "UDP, 1400 bytes", About: "UDP datagrams of 1400 bytes", Payload: 1400},
		{Name: "rr", Title: "request and answer", About: "one byte there and back over TCP, one at a time", Requests: true},
		{Name: "rr-loaded", Title: "request and answer beside a bulk stream", About: "the same beside one TCP stream", Requests: true, Loaded: true},
		{Name: "rr-loaded-reverse", Title: "request and answer against a bulk stream", About: "the same beside one TCP stream from the end that listens", Requests: true, Loaded: true, Reverse: true},
		{Name: "fair8", Title: "8 TCP streams", About: "eight TCP streams, and how even their shares are", Streams: 8, Fair: true},
		{Name: "tcp1-flooded", Title: "TCP beside a UDP flood", About: "one TCP stream beside UDP datagrams of 1400 bytes at full speed", Streams: 1, Flood: 1400},
		{Name: "crr", Title: "TCP connections", About: "TCP connections, one at a time", Connections: true},
	}
}

// WorkloadNames returns the names of the workloads in display order.
func WorkloadNames() []string {
	var names []string
	for _, w := range Workloads() {
		names = append(names, w.Name)
	}
	return names
}

// method is how each measurement is done.
type method struct {
	warmup, duration time.Duration
	lossfree         bool // search the highest rate without loss
}

// generator generates the traffic of a workload and measures it.
type generator interface {
	measure(ctx context.Context, s *site, w Workload, m method) (figures, error)
	// takes estimates how long measure takes.
	takes(w Workload, m method) time.Duration
}

// Generators returns the names of the generators.
func Generators() []string { return []string{builtinName, iperf3Name} }

const builtinName = "builtin"

func generatorOf(name string) generator {
	if name == iperf3Name {
		return iperf3{}
	}
	return builtin{}
}

// figures are the values of one measurement.
type figures map[Metric]float64

// measured reads the receiver after the warm-up and again after the method's
// duration. It returns the cost figures of that time and the bytes and packets per
// second between the two readings.
func measured(ctx context.Context, s *site, m method, read func() (load.Reading, error)) (f figures, bytes, packets float64, err error) {
	if err := sleep(ctx, m.warmup); err != nil {
		return nil, 0, 0, err
	}
	spent, err := s.cost(ctx)
	if err != nil {
		return nil, 0, 0, err
	}
	before, err := read()
	if err != nil {
		return nil, 0, 0, err
	}
	if err := sleep(ctx, m.duration); err != nil {
		return nil, 0, 0, err
	}
	after, err := read()
	if err != nil {
		return nil, 0, 0, err
	}
	total, err := s.cost(ctx)
	if err != nil {
		return nil, 0, 0, err
	}
	bytes, packets = after.Since(before)
	got := float64(after.Bytes - before.Bytes)
	if got == 0 {
		return nil, 0, 0, errors.New("nothing arrived")
	}
	f = figures{}
	s.charge(f, spent, total, got)
	return f, bytes, packets, nil
}

// charge adds the cost of receiving the given number of bytes to the figures.
func (s *site) charge(f figures, spent, total cost, bytes float64) {
	machine := total.Machine.since(spent.Machine)
	s.steal = max(s.steal, machine.stolen())
	f[CPUPerGB] = machine.Busy / (bytes / 1e9)
	if total.RSS > 0 {
		f[DaemonCPUPerGB] = (total.Daemons - spent.Daemons) / (bytes / 1e9)
		f[RSS] = total.RSS / 1e6
	}
	if n := total.Carried - spent.Carried; n > 0 {
		f[FastShare] = float64(total.Fast-spent.Fast) / float64(n)
	}
	if n := total.Packets - spent.Packets; n > 0 {
		f[SyscallsPerPacket] = float64(total.Syscalls-spent.Syscalls) / float64(n)
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// builtin is the generator that uses package load.
type builtin struct{}

func (builtin) takes(w Workload, m method) time.Duration {
	t := m.warmup + m.duration
	if w.Payload > 0 && m.lossfree {
		t += lossfreeSteps * (m.probe() + m.probe()/4)
	}
	return t + 20*time.Millisecond
}

func (b builtin) measure(ctx context.Context, s *site, w Workload, m method) (figures, error) {
	switch {
	case w.Requests:
		return b.requests(ctx, s, w, m)
	case w.Connections:
		return b.connections(ctx, s, m)
	case w.Payload > 0:
		return b.datagrams(ctx, s, w, m)
	case w.Flood > 0:
		return b.flooded(ctx, s, w, m)
	}
	return b.streams(ctx, s, w, m)
}

func (builtin) streams(ctx context.Context, s *site, w Workload, m method) (_ figures, err error) {
	kind := load.Sink
	if w.Reverse {
		kind = load.Source
	}
	far, err := s.far.Open(ctx, load.Spec{Kind: kind, At: s.to})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, far.Close()) }()
	near, err := load.StartStreams(s.near, far.Addr(), w.Streams, w.Reverse)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, near.Close()) }()
	read := far.Reading
	if w.Reverse {
		read = near.Reading
	}
	var readings []load.Reading
	f, bytes, _, err := measured(ctx, s, m, func() (load.Reading, error) {
		r, err := read()
		readings = append(readings, r)
		return r, err
	})
	if err != nil {
		return nil, err
	}
	f[Throughput] = bytes * 8 / 1e9
	if w.Fair {
		maps.Copy(f, fairness(readings[0], readings[1], w.Streams*len(s.near)))
	}
	return f, nil
}

// fairness returns how evenly n streams shared the bytes between two readings:
// Jain's index, (sum x)^2 / (n sum x^2), which is 1 if all are equal and 1/n if one
// has everything (R. Jain, DEC-TR-301, 1984), and the least and the greatest share as
// a multiple of an equal one.
func fairness(before, after load.Reading, n int) figures {
	shares := make([]float64, max(n, len(after.Streams)))
	sum, squares := 0.0, 0.0
	for i, bytes := range after.Streams {
		if i < len(before.Streams) {
			bytes -= before.Streams[i]
		}
		shares[i] = float64(bytes)
		sum += shares[i]
		squares += shares[i] * shares[i]
	}
	if sum == 0 {
		return figures{}
	}
	even := sum / float64(len(shares))
	return figures{
		Jain:       sum * sum / (float64(len(shares)) * squares),
		LeastShare: slices.Min(shares) / even, MostShare: slices.Max(shares) / even,
	}
}

// flooded measures a TCP stream's throughput during a flood of datagrams, which may
// be 0, and the rate of datagrams received.
func (builtin) flooded(ctx context.Context, s *site, w Workload, m method) (_ figures, err error) {
	sink, err := s.far.Open(ctx, load.Spec{Kind: load.Sink, At: s.to})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, sink.Close()) }()
	drain, err := s.far.Open(ctx, load.Spec{Kind: load.Drain, At: s.to})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, drain.Close()) }()
	streams, err := load.StartStreams(s.near, sink.Addr(), w.Streams, false)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, streams.Close()) }()
	flood, err := load.StartDatagrams(s.near, drain.Addr(), w.Flood, 0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, flood.Close()) }()
	if err := sleep(ctx, m.warmup); err != nil {
		return nil, err
	}
	var readings [4]load.Reading
	for i, far := range []load.Session{sink, drain, sink, drain} {
		if i == 2 {
			if err := sleep(ctx, m.duration); err != nil {
				return nil, err
			}
		}
		if readings[i], err = far.Reading(); err != nil {
			return nil, err
		}
	}
	bytes, _ := readings[2].Since(readings[0])
	_, packets := readings[3].Since(readings[1])
	if bytes == 0 && packets == 0 {
		return nil, errors.New("nothing arrived")
	}
	return figures{Throughput: bytes * 8 / 1e9, Rate: packets / 1e3}, nil
}

func (b builtin) datagrams(ctx context.Context, s *site, w Workload, m method) (_ figures, err error) {
	far, err := s.far.Open(ctx, load.Spec{Kind: load.Drain, At: s.to})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, far.Close()) }()
	f, err := func() (_ figures, err error) {
		near, err := load.StartDatagrams(s.near, far.Addr(), w.Payload, 0)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, near.Close()) }()
		f, _, packets, err := measured(ctx, s, m, far.Reading)
		if err == nil {
			f[Rate] = packets / 1e3
		}
		return f, err
	}()
	if err != nil || !m.lossfree {
		return f, err
	}
	rate, err := b.lossfree(ctx, s, w, m, far, f[Rate]*1e3)
	if err != nil {
		return nil, fmt.Errorf("searching for the highest rate without loss: %w", err)
	}
	f[RateLossfree] = rate / 1e3
	return f, nil
}

const (
	// lossfreeSteps is the number of rates that the search tries.
	lossfreeSteps = 6
	// mostLoss is the share of lost datagrams below which a rate counts as without
	// loss.
	mostLoss = 0.001
)

// probe is how long the search tries each rate.
func (m method) probe() time.Duration { return m.duration / 3 }

// lossfree finds by bisection the highest rate, in datagrams per second, at which
// less than mostLoss of the datagrams are lost. It searches up to 1.1 times full, the
// rate received at full speed.
func (builtin) lossfree(ctx context.Context, s *site, w Workload, m method, far load.Session, full float64) (float64, error) {
	try := func(rate float64) (received float64, lost float64, err error) {
		if err := settle(ctx, far); err != nil {
			return 0, 0, err
		}
		before, err := far.Reading()
		if err != nil {
			return 0, 0, err
		}
		start := time.Now()
		near, err := load.StartDatagrams(s.near, far.Addr(), w.Payload, rate)
		if err != nil {
			return 0, 0, err
		}
		err = sleep(ctx, m.probe())
		took := time.Since(start)
		if err := errors.Join(err, near.Close(), settle(ctx, far)); err != nil {
			return 0, 0, err
		}
		after, err := far.Reading()
		if err != nil || near.Sent() == 0 {
			return 0, 1, err
		}
		got := float64(after.Packets - before.Packets)
		return got / took.Seconds(), 1 - got/float64(near.Sent()), nil
	}
	low, high, best := 0.0, full*1.1, 0.0
	for next, steps := full*0.8, 0; ; {
		received, lost, err := try(next)
		if err != nil {
			return 0, err
		}
		if lost < mostLoss {
			// Count what arrived: the sender may have been too slow for the rate.
			best, low = max(best, received), next
		} else {
			high = next
		}
		if steps++; steps == lossfreeSteps {
			return best, nil
		}
		next = (low + high) / 2
	}
}

// settle waits until no more packets arrive.
func settle(ctx context.Context, far load.Session) error {
	var last uint64
	for {
		r, err := far.Reading()
		if err != nil {
			return err
		}
		if r.Packets == last {
			return nil
		}
		last = r.Packets
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}

func (builtin) requests(ctx context.Context, s *site, w Workload, m method) (_ figures, err error) {
	f := figures{}
	if w.Loaded {
		kind := load.Sink
		if w.Reverse {
			kind = load.Source
		}
		bulk, err := s.far.Open(ctx, load.Spec{Kind: kind, At: s.to})
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, bulk.Close()) }()
		stream, err := load.StartStreams(s.near, bulk.Addr(), 1, w.Reverse)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, stream.Close()) }()
		read := bulk.Reading
		if w.Reverse {
			read = stream.Reading
		}
		before, err := read()
		if err != nil {
			return nil, err
		}
		// Report the stream's throughput too (over the requests' warm-up as well): a
		// datapath must not look good by starving the stream.
		defer func() {
			if err != nil {
				return
			}
			var after load.Reading
			if after, err = read(); err == nil {
				bytes, _ := after.Since(before)
				f[Throughput] = bytes * 8 / 1e9
			}
		}()
	}
	far, err := s.far.Open(ctx, load.Spec{Kind: load.Echo, At: s.to})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, far.Close()) }()
	took, err := load.Requests(ctx, s.near, far.Addr(), m.warmup, m.duration)
	if err != nil {
		return nil, err
	}
	for metric, q := range map[Metric]float64{P50: 0.5, P90: 0.9, P99: 0.99, P999: 0.999} {
		f[metric] = float64(load.Quantile(took, q).Nanoseconds()) / 1e3
	}
	return f, nil
}

func (builtin) connections(ctx context.Context, s *site, m method) (_ figures, err error) {
	far, err := s.far.Open(ctx, load.Spec{Kind: load.Accept, At: s.to, Near: len(s.near)})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, far.Close()) }()
	perSecond, err := load.Connections(ctx, s.near, far.Addr(), m.warmup, m.duration)
	if err != nil {
		return nil, err
	}
	return figures{Connections: perSecond}, nil
}
