package backend

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"culvert/internal/api"
	"culvert/internal/firewall"
	"culvert/internal/host"
)

// proving is a Prober whose requests the test answers.
type proving struct {
	*Prober
	t *testing.T
}

func newProving(t *testing.T, targets ...ProbeTarget) proving {
	p := NewProber(ProberOptions{Sources: []netip.Prefix{netip.MustParsePrefix("10.5.1.0/24")}, Silence: &Silence{}, Interval: ProbeInterval, Log: slog.New(slog.DiscardHandler)})
	p.Set(targets)
	return proving{p, t}
}

// target is the n-th peer, whose pods may send packets of 1450 bytes.
func target(n int) ProbeTarget {
	return ProbeTarget{
		Subnet: netip.MustParsePrefix(fmt.Sprintf("10.5.%d.0/24", n)), Public: netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", n)), MTU: 1450,
	}
}

// burst answers the requests that are due, each with a round-trip time of 1 ms or with
// the error that lost returns for its size. It returns the sizes by address.
func (p proving) burst(lost func(size int) error) (sent map[string][]int) {
	sent = map[string][]int{}
	all := p.take(time.Now())
	var errs []error
	for i := range all {
		sent[all[i].to.String()] = append(sent[all[i].to.String()], all[i].size)
		all[i].answered, all[i].rtt = time.Now(), time.Millisecond
		errs = append(errs, lost(all[i].size))
	}
	p.settle(all, errs)
	return sent
}

func (p proving) state(n int) api.PeerState {
	s := api.PeerState{Subnet: target(n).Subnet, PublicIP: target(n).Public}
	p.Describe(&s, time.Now())
	return s
}

var (
	errNoReply = errors.New("no reply")
	answered   = func(int) error { return nil }
	lost       = func(int) error { return errNoReply }
	lostLarge  = func(size int) error {
		if size > 0 {
			return errNoReply
		}
		return nil
	}
)

// TestProberStates plays sequences of results of the requests to one peer, and checks its
// state.
func TestProberStates(t *testing.T) {
	for _, c := range []struct {
		name    string
		bursts  []func(int) error
		state   string
		problem string
		mtu     int
	}{
		{"not probed yet", nil, api.PeerUnknown, "", 0},
		{"answers", []func(int) error{answered}, api.PeerIdle, "", 1450},
		{"one lost request changes nothing", []func(int) error{lost}, api.PeerUnknown, "", 0},
		{"two do", []func(int) error{lost, lost}, api.PeerSilent, "no reply", 0},
		{"an answer ends the silence", []func(int) error{lost, lost, answered}, api.PeerIdle, "", 1450},
		{"it falls silent", []func(int) error{answered, lost, lost}, api.PeerSilent, "no reply", 1450},
		{"only small packets pass", []func(int) error{lostLarge, lostLarge}, api.PeerIdle, "", 0}, // until the path MTU is measured
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newProving(t, target(2))
				for _, b := range c.bursts {
					time.Sleep(ProbeInterval + time.Second)
					if sent := p.burst(b); len(sent["10.5.2.0"]) == 0 {
						t.Errorf("no request: %v", sent)
					}
				}
				if s := p.state(2); s.State != c.state || s.Problem != c.problem || s.PathMTU != c.mtu {
					t.Errorf("%+v", s)
				}
			})
		})
	}
}

// TestProberNarrowPath checks the problem that is reported for a path whose measured MTU
// is below the pods' MTU, or on which no large packet passes.
func TestProberNarrowPath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProving(t, target(2))
		time.Sleep(time.Minute)
		p.burst(answered)
		x := p.peers[peerKey{target(2).Subnet, target(2).Public}]
		for mtu, want := range map[int]string{
			1450: "", 1400: "packets of more than 1400 bytes do not pass, and pods send up to 1450", 0: "small packets pass, large ones do not",
		} {
			x.mtu = mtu
			if s := p.state(2); s.Problem != want {
				t.Errorf("%d: %q", mtu, s.Problem)
			}
		}
	})
}

// TestProberPace checks how often a peer is probed: every ProbeInterval, a peer with traffic
// every probeActive, at the full size every probeSize.
func TestProberPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const hour = time.Hour
		for name, traffic := range map[string]bool{"idle": false, "active": true} {
			p := newProving(t, target(2))
			small, large := 0, 0
			for began := time.Now(); time.Since(began) < hour; time.Sleep(SilenceInterval) {
				p.options.Silence.Observe(time.Now(), []host.PeerActivity{{
					Source: firewall.Source{Inner: target(2).Subnet, Outer: target(2).Public}, Received: traffic,
				}})
				for _, size := range p.burst(answered)["10.5.2.0"] {
					if size > 0 {
						large++
					} else {
						small++
					}
				}
			}
			most := int(hour / ProbeInterval)
			if traffic {
				most = int(hour / probeActive)
			}
			if small > most+1 || small < most*3/4 || large > 7 || large < 4 {
				t.Errorf("%s: %d requests in an hour, want %d; %d of them of full size", name, small, most, large)
			}
		}
	})
}

// TestProberTargets checks that removed targets are no longer probed, not even if their
// request is pending, and that a burst is bounded.
func TestProberTargets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProving(t, target(2), target(3))
		time.Sleep(time.Minute)
		p.Retain([]ProbeTarget{target(3)})
		if sent := p.burst(answered); len(sent) != 1 || !slices.Equal(sent["10.5.3.0"], []int{0, 1450}) {
			t.Errorf("%v", sent)
		}
		time.Sleep(time.Minute)
		going := p.take(time.Now())
		p.Set(nil)
		p.settle(going, make([]error, len(going)))
		time.Sleep(time.Minute)
		if sent := p.burst(answered); len(sent) != 0 || p.has(going[0].peer) {
			t.Errorf("%v", sent)
		}

		var many []ProbeTarget
		for n := range 250 {
			many = append(many, target(n+2))
		}
		p.Set(many[:250])
		time.Sleep(time.Minute)
		if n := len(p.burst(answered)); n > probeBurst {
			t.Errorf("%d peers in a burst", n)
		}
		direct := target(9)
		direct.Direct = true
		p.Set([]ProbeTarget{direct})
		time.Sleep(time.Minute)
		if sent := p.burst(answered); len(sent["192.0.2.9"]) == 0 {
			t.Errorf("a peer without a tunnel is asked at %v", sent)
		}
		if c := p.Count(); c.Sent == 0 || c.Lost != 0 || strings.Trim(fmt.Sprint(c.Seconds.Counts), "[0 ]") == "" {
			t.Errorf("%+v", c)
		}
	})
}
