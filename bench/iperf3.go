package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"culvert/bench/load"
	"culvert/internal/lab"
)

// iperf3 is the generator that runs the program of that name, to check the built-in
// generator. It measures whole seconds and supports only plain streams and datagrams.
// It has no cost figures, since iperf3 itself decides when the traffic starts and
// ends. An iperf3 server serves one client, so each sender has its own server.
type iperf3 struct{}

const (
	iperf3Name = "iperf3" // of the generator and of the program
	iperf3Port = 5201
)

func (iperf3) available() (ok bool, why string) {
	if _, err := exec.LookPath(iperf3Name); err != nil {
		return false, "iperf3 is not on PATH"
	}
	return true, ""
}

func (iperf3) takes(w Workload, m method) time.Duration {
	if !w.Plain() {
		return 0
	}
	const start = 500 * time.Millisecond
	return wholeSeconds(m.duration) + wholeSeconds(m.warmup) + start
}

func wholeSeconds(d time.Duration) time.Duration {
	return time.Duration(math.Ceil(d.Seconds())) * time.Second
}

// iperf3Report is the part of `iperf3 --json` that is used.
type iperf3Report struct {
	Error string `json:"error"`
	End   struct {
		Received struct {
			Bits    float64 `json:"bits_per_second"`
			Bytes   float64 `json:"bytes"`
			Seconds float64 `json:"seconds"`
		} `json:"sum_received"`
		Congestion string `json:"sender_tcp_congestion"`
	} `json:"end"`
}

func (iperf3) measure(ctx context.Context, s *site, w Workload, m method) (figures, error) {
	if !w.Plain() {
		return nil, unavailable("iperf3 has no such workload: use --generator builtin")
	}
	if s.labs == nil {
		return nil, unavailable("iperf3 runs only in a lab: use --generator builtin")
	}
	senders := s.ends[1:]
	for i := range senders {
		server, err := s.ends[0].Start(lab.Command{
			Name: fmt.Sprintf("iperf3-%d-%d", time.Now().UnixNano(), i), Path: iperf3Name,
			Args: []string{"-s", "-1", "-B", s.to.String(), "-p", strconv.Itoa(iperf3Port + i), "--forceflush"},
		})
		if err != nil {
			return nil, err
		}
		defer func() { _ = server.Stop() }()
		if _, err := server.WaitLine(ctx, "Server listening"); err != nil {
			return nil, err
		}
	}

	whole := func(d time.Duration) string { return strconv.Itoa(int(wholeSeconds(d).Seconds())) }
	args := []string{"-c", s.to.String(), "--json", "-t", whole(m.duration), "-O", whole(m.warmup)}
	if w.Payload > 0 {
		args = append(args, "-u", "-b", "0", "-l", strconv.Itoa(w.Payload), "-w", strconv.Itoa(socketBuffer(load.UDPBuffer)))
	} else {
		// -N is TCP_NODELAY, which the built-in streams set too. Without it the last
		// segments of writes are held back and sent in bursts, and the receiver's link
		// drops some.
		args = append(args, "-C", load.Congestion, "-N", "-P", strconv.Itoa(w.Streams))
		if w.Reverse {
			args = append(args, "-R")
		}
	}
	var all sync.WaitGroup
	values, errs := make([]float64, len(senders)), make([]error, len(senders))
	for i, n := range senders {
		all.Go(func() {
			text, err := n.Run(ctx, iperf3Name, append(slices.Clone(args), "-p", strconv.Itoa(iperf3Port+i))...)
			r, perr := parseIPerf3(text, w)
			if errs[i] = errors.Join(perr, err); errs[i] != nil {
				return
			}
			values[i] = r.End.Received.Bits / 1e9
			if w.Payload > 0 {
				// From the bytes, since its count of lost packets includes the warm-up's.
				values[i] = r.End.Received.Bytes / float64(w.Payload) / r.End.Received.Seconds / 1e3
			}
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	sum := 0.0
	for _, v := range values {
		sum += v
	}
	if w.Payload > 0 {
		return figures{Rate: sum}, nil
	}
	return figures{Throughput: sum}, nil
}

// socketBuffer returns the largest socket buffer, up to want bytes, that the kernel
// grants; iperf3 fails if it gets less than it asked for.
func socketBuffer(want int) int {
	for _, limit := range []string{"rmem_max", "wmem_max"} {
		text, err := os.ReadFile("/proc/sys/net/core/" + limit)
		if n, nerr := strconv.Atoi(strings.TrimSpace(string(text))); err == nil && nerr == nil {
			want = min(want, n)
		}
	}
	return want
}

func parseIPerf3(text []byte, w Workload) (iperf3Report, error) {
	var r iperf3Report
	if err := json.Unmarshal(text, &r); err != nil {
		return r, fmt.Errorf("iperf3 --json printed no JSON: %w", err)
	}
	switch {
	case r.Error != "":
		return r, fmt.Errorf("iperf3: %s", r.Error)
	case r.End.Received.Seconds == 0:
		return r, errors.New("iperf3 --json has no end.sum_received")
	case w.Payload == 0 && r.End.Congestion != "" && r.End.Congestion != load.Congestion:
		return r, fmt.Errorf("iperf3 used the congestion control %s", r.End.Congestion)
	}
	return r, nil
}

// iperf3Version returns the first line of `iperf3 --version`.
func iperf3Version() string {
	text, err := exec.Command(iperf3Name, "--version").Output()
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(text), "\n")
	return strings.TrimSpace(line)
}
