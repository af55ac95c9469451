package test

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	clientv3 "go.etcd.io/etcd/client/v3"

	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
	"culvert/subnet/etcd"
)

// The model test: 100 nodes compete for 50 subnets in an etcd cluster of three members,
// which are killed, paused, partitioned and compacted meanwhile. Nodes release their leases
// and acquire new ones. Some nodes are cut off from etcd until their lease has expired, and
// then reconnected; some of these are restarted meanwhile and resume from their files. Four
// properties are checked:
//
//  1. In etcd's history no key changes its owner without having been deleted, and no node
//     has two subnets.
//  2. Each list equals that history at the list's revision, and a node is told that no
//     subnet is free only if at some moment of the call other nodes had all 50.
//  3. For each subnet the history of calls is linearizable (porcupine).
//  4. At no moment do two nodes both believe that they hold a valid lease of one subnet.
//
// CULVERT_MODEL_ROUNDS is the number of rounds; the default is 5, or 1 with -short.
const (
	modelNodes   = 100
	modelSubnets = 50
	modelConfig  = `{"Network":"10.5.0.0/18","SubnetMin":"10.5.1.0","SubnetMax":"10.5.50.0","Backend":{"Type":"vxlan"}}`
	modelFaults  = 4 * time.Second // duration of the faults in a round
	modelTTL     = 3 * time.Second // of mortal nodes; other leases do not expire during a round
)

// mortal reports whether a node has a short lease, which may expire because the node is cut
// off or because etcd is unreachable. Mortal nodes never release their leases.
func mortal(n int) bool { return n%10 == 0 }

func TestModel(t *testing.T) {
	labtest.Need(t)
	t.Parallel() // with the tests that mostly wait
	rounds := 5
	if testing.Short() {
		rounds = 1
	}
	if text := os.Getenv("CULVERT_MODEL_ROUNDS"); text != "" {
		var err error
		if rounds, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	m := startMembers(t, labtest.New(t, lab.Options{Nodes: 3}))
	c := m.client()
	seed := uint64(1) // CULVERT_MODEL_SEED chooses another: make nightly does
	if text := os.Getenv("CULVERT_MODEL_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("CULVERT_MODEL_SEED=%d", seed)
	var sum tally
	for k := range rounds {
		r := &round{t: t, members: m, client: c, prefix: fmt.Sprintf("/model/%d", k), random: rand.New(rand.NewPCG(seed, uint64(k)))}
		r.play()
		sum.add(r.tally)
		if t.Failed() {
			t.Fatalf("round %d of seed %d: %+v", k, seed, r.tally)
		}
		if k%10 == 9 {
			t.Logf("%d rounds: %+v", k+1, sum)
		}
	}
	t.Logf("%d rounds: %+v", rounds, sum)
	if rounds >= 5 && (sum.kills == 0 || sum.pauses == 0 || sum.cuts == 0 || sum.compactions == 0 || sum.expiries == 0 || sum.resumed == 0) {
		t.Error("a kind of fault did not happen")
	}
}

// tally counts the events of a round.
type tally struct{ acquired, exhausted, released, lists, expiries, resumed, kills, pauses, cuts, compactions, changes int }

func (a *tally) add(b tally) {
	a.acquired, a.exhausted, a.released, a.lists, a.expiries = a.acquired+b.acquired, a.exhausted+b.exhausted, a.released+b.released, a.lists+b.lists, a.expiries+b.expiries
	a.resumed += b.resumed
	a.kills, a.pauses, a.cuts, a.compactions, a.changes = a.kills+b.kills, a.pauses+b.pauses, a.cuts+b.cuts, a.compactions+b.compactions, a.changes+b.changes
}

// call is one call of a node and its result, or an expiry in etcd.
type call struct {
	kind   string // acquire, exhausted, release, expire, list
	node   int    // 1 to modelNodes
	subnet int    // 1 to modelSubnets; 0: none
	owners owners // result of a list
	// revision is that of the list, or the one that created the acquired lease. For
	// other kinds it is one that etcd had reached before the call.
	revision int64
}

// owners has the owner of each subnet, 0 for none.
type owners [modelSubnets + 1]int

// round is one round, under a separate prefix in etcd.
type round struct {
	t       *testing.T
	members *members
	client  *clientv3.Client
	prefix  string
	random  *rand.Rand
	began   time.Time
	tally   tally

	mu    sync.Mutex
	calls []porcupine.Operation
	ready [modelNodes + 1]*etcd.Registry // of the nodes that hold a lease

	history *history
	faults  atomic.Bool // faults are being injected
}

func (r *round) now() int64 { return int64(time.Since(r.began)) }

func (r *round) record(at int64, c call) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, porcupine.Operation{ClientId: c.node, Input: c, Call: at, Return: r.now()})
	switch c.kind {
	case "acquire":
		r.tally.acquired++
	case "exhausted":
		r.tally.exhausted++
	case "release":
		r.tally.released++
	case "list":
		r.tally.lists++
	}
}

func (r *round) play() {
	ctx, cancel := context.WithTimeout(r.t.Context(), 100*time.Second)
	defer cancel()
	r.began = time.Now()
	resp, err := r.client.Put(ctx, r.prefix+"/config", modelConfig)
	if err != nil {
		r.t.Fatal(err)
	}
	r.history = newHistory(r.prefix, resp.Header.Revision)
	watching, unwatch := context.WithCancel(ctx)
	var background sync.WaitGroup
	background.Go(func() { r.history.follow(watching, r.client) })
	sampling, unsample := context.WithCancel(ctx)
	background.Go(func() { r.sample(sampling) })
	for reader := range 2 {
		background.Go(func() { r.read(sampling, reader) })
	}
	r.faults.Store(true)
	nemesis := rand.New(rand.NewPCG(r.random.Uint64(), 0))
	background.Go(func() {
		defer r.faults.Store(false)
		r.break_(ctx, nemesis)
	})

	// Winners keep their lease until all nodes have finished.
	var nodes, playing sync.WaitGroup
	playing.Add(modelNodes)
	winners := make(chan int, modelNodes)
	var late atomic.Int64 // winners whose lease expired while they waited for other nodes
	for n := 1; n <= modelNodes; n++ {
		p := &player{round: r, n: n, random: rand.New(rand.NewPCG(r.random.Uint64(), uint64(n)))}
		if mortal(n) {
			p.dir = r.t.TempDir()
		}
		nodes.Go(func() {
			won := p.play(ctx)
			playing.Done()
			playing.Wait()
			switch {
			case won && !p.lost.Load():
				winners <- n
			case won:
				late.Add(1)
			}
			p.leave()
		})
	}
	nodes.Wait()
	if ctx.Err() != nil {
		r.t.Error("the round took longer than its timeout")
	}
	unsample()
	// The history is complete once it contains a last write.
	last, err := r.client.Put(ctx, r.prefix+"/subnets/end", "")
	if err != nil {
		r.t.Error(err)
	} else {
		eventually(r.t, "etcd's history is complete", func() error {
			if at := r.history.at(); at < last.Header.Revision {
				return fmt.Errorf("read to revision %d of %d", at, last.Header.Revision)
			}
			return nil
		})
	}
	unwatch()
	background.Wait()
	if n := len(winners); n > modelSubnets || n+int(late.Load()) < modelSubnets {
		r.t.Errorf("%d nodes hold the %d subnets, and %d leases expired meanwhile", n, modelSubnets, late.Load())
	}
	r.judge()
}

// sample repeatedly checks that no two nodes hold a lease of one subnet that, as far as they
// know, has not expired.
func (r *round) sample(ctx context.Context) {
	for ctx.Err() == nil {
		r.mu.Lock()
		var by [modelSubnets + 1]int
		for n, registry := range r.ready {
			if registry == nil {
				continue
			}
			l, ok := registry.Held()
			if !ok || !time.Now().Before(l.Expires) {
				continue
			}
			index := l.Subnets()[0].Addr().As4()[2]
			if other := by[index]; other != 0 {
				r.t.Errorf("nodes %d and %d both believe that they hold subnet %d", other, n, index)
			}
			by[index] = n
		}
		r.mu.Unlock()
		time.Sleep(2 * time.Millisecond)
	}
}

// read lists the leases repeatedly and records the results.
func (r *round) read(ctx context.Context, reader int) {
	registry, err := etcd.New(etcd.Options{Endpoints: r.members.urls(), Prefix: r.prefix, Logger: slog.New(slog.DiscardHandler), RequestTimeout: time.Second, Dial: r.members.dial})
	if err != nil {
		r.t.Error(err)
		return
	}
	defer func() { _ = registry.Close() }()
	for ctx.Err() == nil {
		at := r.now()
		entries, revision, err := registry.Entries(ctx, false)
		if err == nil {
			c := call{kind: "list", node: modelNodes + 1 + reader, revision: revision}
			for _, e := range entries {
				if l, err := e.Lease(); err == nil {
					c.owners[l.Subnets()[0].Addr().As4()[2]] = nodeNumber(l.Node)
				}
			}
			r.record(at, c)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func nodeName(n int) string { return "node-" + strconv.Itoa(n) }

func nodeNumber(name string) int {
	n, err := strconv.Atoi(strings.TrimPrefix(name, "node-"))
	if err != nil {
		return -1
	}
	return n
}

// break_ injects faults one after another and ends each before the next. A fault affects one
// member or, at times, two, so that there is no quorum.
func (r *round) break_(ctx context.Context, random *rand.Rand) {
	m := r.members
	for end := time.Now().Add(modelFaults); time.Now().Before(end) && ctx.Err() == nil; {
		i := random.IntN(3)
		if random.IntN(2) == 0 {
			if leader := m.leader(ctx, r.client); leader >= 0 {
				i = leader
			}
		}
		victims := []int{i}
		if random.IntN(5) == 0 {
			victims = append(victims, (i+1)%3)
		}
		pause := func() { time.Sleep(500*time.Millisecond + time.Duration(random.IntN(1000))*time.Millisecond) }
		switch random.IntN(4) {
		case 0:
			r.tally.kills++
			for _, v := range victims {
				m.kill(v)
			}
			pause()
			for _, v := range victims {
				m.start(v)
			}
		case 1:
			r.tally.pauses++
			for _, v := range victims {
				m.signal(v, syscall.SIGSTOP)
			}
			pause()
			for _, v := range victims {
				m.signal(v, syscall.SIGCONT)
			}
		case 2:
			r.tally.cuts++
			for _, v := range victims {
				m.cut(v, true)
			}
			pause()
			for _, v := range victims {
				m.cut(v, false)
			}
		case 3:
			// Only up to the revision that our history has read.
			if at := r.history.at(); at > 1 {
				cctx, cancel := context.WithTimeout(ctx, time.Second)
				if _, err := r.client.Compact(cctx, at); err == nil {
					r.tally.compactions++
				}
				cancel()
			}
		}
		time.Sleep(time.Duration(random.IntN(300)) * time.Millisecond)
	}
}

// judge checks the calls against the history and the model.
func (r *round) judge() {
	for _, problem := range r.history.problems() {
		r.t.Error(problem)
	}
	r.tally.changes = r.history.count()
	calls := r.unasked()
	for _, o := range r.calls {
		switch c := o.Input.(call); c.kind {
		case "list":
			if want := r.history.ownersAt(c.revision); want != c.owners {
				r.t.Errorf("a list at revision %d has %v, but etcd's history has %v", c.revision, c.owners, want)
			}
		case "exhausted":
			if until := r.revisionAfter(o.Return); !r.history.fullWithout(c.node, c.revision, until) {
				r.t.Errorf("node %d was told that no subnet is free, but at all revisions from %d to %d one was", c.node, c.revision, until)
			}
			continue
		}
		calls = append(calls, o)
	}
	result, info := porcupine.CheckOperationsVerbose(subnetModel, calls, 30*time.Second)
	if result != porcupine.Ok {
		r.t.Errorf("the calls are not linearizable: %v", result)
		if f, err := os.CreateTemp("", "culvert-model-*.html"); err == nil {
			_ = porcupine.Visualize(subnetModel, info, f)
			r.t.Logf("visualization: %s", f.Name())
			_ = f.Close()
		}
	}
}

// unasked returns the changes without a recorded call as operations: leases that expired,
// and leases that their holders wrote again. Their time is bounded by the history: before
// the watch delivered the change, and after every list that does not have it yet.
func (r *round) unasked() []porcupine.Operation {
	asked := map[int64]int64{} // the revisions of acquired leases, and when they were asked for
	for _, o := range r.calls {
		if c := o.Input.(call); c.kind == "acquire" {
			if at, ok := asked[c.revision]; !ok || o.Call < at {
				asked[c.revision] = o.Call
			}
		}
	}
	var out []porcupine.Operation
	var o owners
	var stray [modelSubnets + 1]bool // owned by a node that did not get the answer
	for _, ch := range r.history.changes {
		was := o[ch.subnet]
		o[ch.subnet] = ch.owner
		after := int64(0)
		for _, l := range r.calls {
			if list := l.Input.(call); list.kind == "list" && list.revision < ch.revision {
				after = max(after, l.Call)
			}
		}
		at, wasAsked := asked[ch.revision]
		c := call{kind: "acquire", node: ch.owner, subnet: ch.subnet}
		switch {
		case ch.owner == 0 && mortal(was):
			c.kind, c.node = "expire", was
			r.tally.expiries++
		case ch.owner == 0 && stray[ch.subnet]:
			// A transaction whose answer was lost was committed late. Its node had
			// checked before that and found nothing, and has revoked the etcd lease.
			c.kind, c.node = "expire", was
		case ch.owner == 0 || ch.owner == was:
			continue
		case wasAsked:
			stray[ch.subnet] = false
			if at <= after {
				continue
			}
			// Perhaps an earlier call, whose answer was lost, made this change, and the call
			// that asked found it.
		default:
			stray[ch.subnet] = !mortal(ch.owner)
		}
		out = append(out, porcupine.Operation{ClientId: modelNodes + 10, Input: c, Call: after, Return: int64(ch.seen.Sub(r.began))})
	}
	return out
}

// revisionAfter returns an upper bound of etcd's revision at a time: the least revision of
// the lists that were called later.
func (r *round) revisionAfter(at int64) int64 {
	least := r.history.at()
	for _, o := range r.calls {
		if c := o.Input.(call); c.kind == "list" && o.Call > at {
			least = min(least, c.revision)
		}
	}
	return least
}

// subnetModel is the model of one subnet. Its state is the owner, 0 for none. A list is part
// of every subnet's history.
var subnetModel = porcupine.Model{
	Partition: func(all []porcupine.Operation) [][]porcupine.Operation {
		parts := make([][]porcupine.Operation, modelSubnets)
		for s := range parts {
			for _, o := range all {
				c := o.Input.(call)
				if c.subnet == s+1 || c.subnet == 0 {
					if c.kind == "list" {
						c.node = c.owners[s+1]
						c.owners = owners{}
					}
					o.Input, o.Output = c, nil
					parts[s] = append(parts[s], o)
				}
			}
		}
		return parts
	},
	Init: func() any { return 0 },
	Step: func(state, input, _ any) (bool, any) {
		owner, c := state.(int), input.(call)
		switch c.kind {
		case "acquire":
			return owner == 0 || owner == c.node, c.node
		case "release", "expire":
			return owner == c.node, 0
		case "list":
			return owner == c.node, owner
		}
		return false, owner
	},
	DescribeOperation: func(input, _ any) string {
		c := input.(call)
		return fmt.Sprintf("%s by %d", c.kind, c.node)
	},
	DescribeState: func(state any) string { return fmt.Sprintf("owner: node %d", state) },
}
