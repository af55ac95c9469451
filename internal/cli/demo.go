package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"culvert/cni"
	"culvert/internal/api"
	"culvert/internal/lab"
)

const (
	demoConfig   = `{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan"}}`
	demoTransfer = 100_000_000 // bytes
	// reflectorPort is where each end replies with the source address that it saw
	// (lab.ServeReflector).
	reflectorPort = 7000

	maxDemoNodes = 50
	maxDemoPods  = 100
)

// Timeouts of the demo's steps.
const (
	storeStart   = 30 * time.Second
	daemonStart  = 60 * time.Second
	firstContact = 10 * time.Second // for the first reply of a pod
	pingAgain    = 2 * time.Second
	transferTime = 2 * time.Minute
	podRemoval   = 30 * time.Second
)

// demoFlags are the flags of culvert demo.
type demoFlags struct {
	nodes, pods int
	datapath    string
	keep        bool
	remove      string
	output      string
}

func newDemoCommand() *cobra.Command {
	var f demoFlags
	c := &cobra.Command{
		Use:   "demo",
		Short: "Show pods on several nodes reaching each other, on this machine",
		Long: `Show pods on several nodes reaching each other, on this machine.

Each node is a network namespace with its own culvert daemon; an etcd server and
a bridge join them. The nodes carry packets in userspace and in the kernel in turn. Pods are added by the real CNI plugins. Then every pod pings
every other, and nodes and pods of other nodes ping each other; the far end reports
which source address it saw. 100 MB are transferred between nodes, in each direction.
Afterwards everything is removed, unless --keep is given.

It needs root, or user namespaces and /dev/net/tun.

Exit code 0: everything was reached, untranslated and intact; 1: not.`,
		Example: `  culvert demo
  culvert demo --nodes 5 --pods 1 -o json
  culvert demo --keep`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return f.run(c) },
	}
	flags := c.Flags()
	flags.SortFlags = false
	flags.IntVar(&f.nodes, "nodes", 3, "how many nodes")
	flags.IntVar(&f.pods, "pods", 2, "how many pods on each node")
	flags.StringVar(&f.datapath, "datapath", "mixed", "the daemons' --datapath: auto, userspace, kernel, or mixed: userspace and auto in turn")
	flags.BoolVar(&f.keep, "keep", false, "leave it up, and print how to enter it and how to remove it")
	flags.StringVar(&f.remove, "remove", "", "remove a demo that was kept, by its name")
	flags.StringVarP(&f.output, "output", "o", "table", "how to show the result: table or json")
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp))
	_ = c.RegisterFlagCompletionFunc("remove", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		ids, _ := lab.List()
		return ids, cobra.ShellCompDirectiveNoFileComp
	})
	return c
}

func (f *demoFlags) run(c *cobra.Command) error {
	switch {
	case f.nodes < 1 || f.nodes > maxDemoNodes:
		return usagef("--nodes %d: 1 to %d", f.nodes, maxDemoNodes)
	case f.pods < 1 || f.pods > maxDemoPods:
		return usagef("--pods %d: 1 to %d", f.pods, maxDemoPods)
	case !slices.Contains([]string{"auto", "userspace", "kernel", "mixed"}, f.datapath):
		return usagef("--datapath %s: auto, userspace, kernel or mixed", f.datapath)
	case f.output != "table" && f.output != "json":
		return usagef("--output %s: table or json", f.output)
	}
	if f.remove != "" {
		return f.removeKept(c)
	}

	code, again, err := lab.EnterUserNamespace()
	if err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	if again {
		if code != exitOK {
			return errReported
		}
		return nil
	}
	if err := lab.CheckTUN(); err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	bin, err := demoPrograms()
	if err != nil {
		return fmt.Errorf("demo: %w", err)
	}

	// Environment variables set for a daemon of this machine must not reach the demo's
	// daemons, which are configured by flags.
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); strings.HasPrefix(name, "CULVERT_") {
			if err := os.Unsetenv(name); err != nil {
				return fmt.Errorf("demo: %w", err)
			}
		}
	}

	// A closed terminal or pipe stops the demo in order, as Ctrl-C does. A second Ctrl-C
	// kills it; the next demo cleans up.
	ctx, stop := signal.NotifyContext(c.Context(), syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	defer context.AfterFunc(ctx, func() { signal.Reset(os.Interrupt, syscall.SIGTERM) })()

	d := &demo{
		nodes: f.nodes, pods: f.pods, bin: bin, datapath: f.datapath, keep: f.keep,
		out: c.OutOrStdout(), progress: progress{w: c.ErrOrStderr(), start: time.Now()},
		json: f.output == "json",
		Result: demoResult{
			Nodes: []demoNode{}, Pods: []demoPod{}, Pings: []demoPing{}, Transfers: []demoFlow{},
		},
	}
	return d.run(ctx)
}

func (f *demoFlags) removeKept(c *cobra.Command) error {
	err := lab.Remove(f.remove)
	if errors.Is(err, lab.ErrNoLab) {
		ids, _ := lab.List()
		if len(ids) == 0 {
			return fmt.Errorf("demo: %s: there is no demo on this machine (one made without root lives and ends with its own process)", f.remove)
		}
		return fmt.Errorf("demo: %s: there is no such demo; there are: %s", f.remove, strings.Join(ids, ", "))
	}
	if err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	fmt.Fprintf(c.ErrOrStderr(), "Demo %s is removed.\n", f.remove)
	return nil
}

// demoPrograms returns the directory of the programs that a demo runs.
func demoPrograms() (string, error) {
	bin, err := lab.FindBin()
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(filepath.Join(bin, "culvert-etcd")); err != nil {
		return "", fmt.Errorf("%s is not there: run make first", filepath.Join(bin, "culvert-etcd"))
	}
	return bin, nil
}

// demo is one run of culvert demo.
type demo struct {
	nodes, pods int
	bin         string
	datapath    string
	keep, json  bool
	out         io.Writer
	progress    progress

	lab     *lab.Lab
	daemons map[string]*lab.Process // by node
	ends    []*demoEnd
	Result  demoResult
}

// demoEnd takes part in pings: a pod, or a node with its address in its own subnet.
type demoEnd struct {
	*lab.Namespace
	name string
	node *lab.Node
	pod  *lab.Pod // nil for a node
	addr netip.Addr
}

// run builds the cluster, measures, reports, and tears down.
func (d *demo) run(ctx context.Context) (err error) {
	swept, err := lab.Sweep()
	if err != nil {
		writeError(d.progress.w, err)
	}
	for _, id := range swept {
		d.progress.say("removed what the demo %s left when it was killed", id)
	}
	if d.lab, err = lab.New(lab.Options{
		Nodes: d.nodes, Bin: d.bin,
		// Without root the namespaces end with this process.
		Keep: d.keep && !lab.Rootless(),
	}); err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	kept := false
	defer func() {
		if !kept {
			err = errors.Join(err, d.tearDown())
		}
	}()

	err = d.show(ctx)
	d.Result.OK = err == nil && d.Result.good()
	interrupted := ctx.Err() != nil
	if interrupted {
		d.progress.say("interrupted")
		err = errReported
	} else if err != nil {
		err = fmt.Errorf("demo: %w", err)
	}
	if werr := d.report(); werr != nil {
		err = errors.Join(err, fmt.Errorf("demo: %w", werr))
	}
	if !d.Result.OK && !interrupted {
		d.showLogs()
	}
	if d.keep && !interrupted {
		var kerr error
		if kept, kerr = d.leaveUp(ctx); kerr != nil {
			err = errors.Join(err, fmt.Errorf("demo: %w", kerr))
		}
	}
	if err == nil && !d.Result.OK {
		err = errReported
	}
	return err
}

// show builds the cluster and sends traffic. It returns an error if it could not go on;
// pings and transfers that failed are in d.Result.
func (d *demo) show(ctx context.Context) error {
	d.progress.say("%s: %s and the network between them, all in network namespaces", d.lab.ID, count(d.nodes, "node"))
	store, err := d.startStore(ctx)
	if err != nil {
		return err
	}
	if err := d.startDaemons(ctx, store); err != nil {
		return err
	}
	if err := d.addPods(ctx); err != nil {
		return err
	}
	if err := d.pingAll(ctx); err != nil {
		return err
	}
	if err := d.transferAll(ctx); err != nil {
		return err
	}
	return ctx.Err()
}

// startStore runs etcd in the fabric and writes the network configuration to it.
func (d *demo) startStore(ctx context.Context) (url string, err error) {
	ctx, cancel := context.WithTimeout(ctx, storeStart)
	defer cancel()
	listen := netip.AddrPortFrom(d.lab.FabricAddrs[0], 2379).String()
	store, err := d.lab.Fabric.Start(lab.Command{
		Name: "etcd", Path: filepath.Join(d.bin, "culvert-etcd"),
		Args: []string{"--data-dir", filepath.Join(d.lab.Dir, "etcd"), "--listen-client", listen, "--unsafe-no-fsync"},
	})
	if err != nil {
		return "", err
	}
	if _, err := store.WaitLine(ctx, "ready "); err != nil {
		return "", err
	}
	url = "http://" + listen
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	if _, err := d.lab.Fabric.Run(ctx, self, "config", "set", "--etcd-endpoints", url, demoConfig); err != nil {
		return "", fmt.Errorf("setting the network configuration: %w", err)
	}
	d.progress.say("etcd serves at %s; the network is %s", url, demoConfig)
	return url, nil
}

// startDaemons starts culvert on all nodes at once and waits for their leases.
func (d *demo) startDaemons(ctx context.Context, store string) error {
	ctx, cancel := context.WithTimeout(ctx, daemonStart)
	defer cancel()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	d.daemons = map[string]*lab.Process{}
	for i, n := range d.lab.Nodes {
		datapath := d.datapath
		if datapath == "mixed" {
			datapath = []string{"userspace", "auto"}[i%2]
		}
		p, err := n.Start(lab.Command{
			Name: n.ID, Path: self,
			Args: []string{
				"run", "--node-id", n.ID, "--run-dir", n.RunDir, "--subnet-file", n.SubnetFile(),
				"--etcd-endpoints", store, "--iface", n.Link, "--datapath", datapath,
			},
		})
		if err != nil {
			return err
		}
		d.daemons[n.ID] = p
	}
	for _, n := range d.lab.Nodes {
		env, err := awaitSubnetEnv(ctx, n, d.daemons[n.ID])
		if err != nil {
			return err
		}
		status, err := api.GetStatus(ctx, n.RunDir)
		if err != nil {
			return err
		}
		d.Result.Nodes = append(d.Result.Nodes, demoNode{
			Name: n.ID, Underlay: n.Addrs[0], Subnet: env.Subnets()[0], Datapath: status.Datapath.Kind, MTU: env.MTU,
		})
		d.ends = append(d.ends, &demoEnd{Namespace: n.Namespace, name: n.ID, node: n, addr: env.Gateways[0].Addr()})
		d.progress.say("%s (%s) leased %s", n.ID, n.Addrs[0], env.Subnets()[0])
	}
	return nil
}

// awaitSubnetEnv waits until the daemon has written subnet.env.
func awaitSubnetEnv(ctx context.Context, n *lab.Node, daemon *lab.Process) (cni.SubnetEnv, error) {
	for {
		env, err := cni.ReadSubnetEnv(n.SubnetFile())
		if err == nil {
			return env, nil
		}
		select {
		case <-daemon.Exited():
			return env, fmt.Errorf("the daemon of %s ended (%w) before it had a lease:\n%s", n.ID, daemon.Err(), daemon.Tail(20))
		case <-ctx.Done():
			return env, fmt.Errorf("the daemon of %s got no lease: %w:\n%s", n.ID, ctx.Err(), daemon.Tail(20))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// addPods adds every node's pods, in parallel across nodes.
func (d *demo) addPods(ctx context.Context) error {
	pods := make([][]*lab.Pod, len(d.lab.Nodes))
	errs := make([]error, len(d.lab.Nodes))
	var wg sync.WaitGroup
	for i, n := range d.lab.Nodes {
		wg.Go(func() {
			for k := 1; k <= d.pods && errs[i] == nil && ctx.Err() == nil; k++ {
				var p *lab.Pod
				if p, errs[i] = n.AddPod(ctx, fmt.Sprintf("p%d", k)); errs[i] == nil {
					pods[i] = append(pods[i], p)
				}
			}
		})
	}
	wg.Wait()
	for i, n := range d.lab.Nodes {
		for _, p := range pods[i] {
			d.Result.Pods = append(d.Result.Pods, demoPod{Name: p.ID, Node: n.ID, Address: p.Addr(true)})
			d.ends = append(d.ends, &demoEnd{Namespace: p.Namespace, name: p.ID, node: n, pod: p, addr: p.Addr(true)})
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	d.progress.say("added %s through culvert-cni, bridge and host-local", count(len(d.Result.Pods), "pod"))
	return ctx.Err()
}

// leaveUp prints how to explore the demo. As root it then outlives this process;
// otherwise leaveUp waits until the process is told to end.
func (d *demo) leaveUp(ctx context.Context) (kept bool, err error) {
	self, err := os.Executable()
	if err != nil {
		return false, err
	}
	inside := ""
	if lab.Rootless() {
		inside = fmt.Sprintf("nsenter --preserve-credentials -U -n -m -t %d ", os.Getpid())
	}
	enter := inside + "ip netns exec "
	w := d.progress.w
	fmt.Fprintf(w, "\nThe demo %s stays up. To look around:\n", d.lab.ID)
	n1 := d.lab.Nodes[0]
	fmt.Fprintf(w, "  %s%s %s status --run-dir %s\n", enter, n1.Name, self, n1.RunDir)
	fmt.Fprintf(w, "  %s%s ip route\n", enter, n1.Name)
	fmt.Fprintf(w, "  %s%s page --run-dir %s    # prints the address of a page that shows it\n", strings.Replace(inside, " -n ", " ", 1), self, n1.RunDir)
	var a, b *demoEnd
	for _, e := range d.ends {
		switch {
		case e.pod != nil && a == nil:
			a = e
		case e.pod != nil && (b == nil || b.node == a.node):
			b = e
		}
	}
	if a != nil && b != nil {
		fmt.Fprintf(w, "  %s%s ping %s\n", enter, a.Name, b.addr)
	}
	fmt.Fprintf(w, "  %s%s tcpdump -ni underlay udp port 8472\n", enter, d.lab.Fabric.Name)
	fmt.Fprintf(w, "  %stail -f %s\n", inside, filepath.Join(d.lab.Dir, "logs", n1.ID+".log"))
	if lab.Rootless() {
		fmt.Fprintf(w, "It is removed when you press Ctrl-C.\n")
		<-ctx.Done()
		return false, nil
	}
	if err := d.lab.Keep(); err != nil {
		return false, err
	}
	fmt.Fprintf(w, "To remove it:\n  %s demo --remove %s\n", self, d.lab.ID)
	return true, nil
}

// tearDown deletes the pods through the plugins, as a container runtime does, and
// removes everything. Signals do not interrupt it.
func (d *demo) tearDown() error {
	ctx, cancel := context.WithTimeout(context.Background(), podRemoval)
	defer cancel()
	errs := make([]error, len(d.ends))
	var wg sync.WaitGroup
	for i, e := range d.ends {
		if e.pod != nil {
			wg.Go(func() { errs[i] = e.pod.Delete(ctx) })
		}
	}
	wg.Wait()
	if err := errors.Join(append(errs, d.lab.Close())...); err != nil {
		return fmt.Errorf("removing the demo: %w", err)
	}
	d.progress.say("removed %s: nothing of it is left", d.lab.ID)
	return nil
}

// progress prints the steps done, with the time since the start.
type progress struct {
	w     io.Writer
	start time.Time
}

func (p progress) say(format string, args ...any) {
	fmt.Fprintf(p.w, "%5.1f s  %s\n", time.Since(p.start).Seconds(), fmt.Sprintf(format, args...))
}

// count formats a number with its noun in the right number.
func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}
