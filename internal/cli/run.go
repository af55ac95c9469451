package cli

import (
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"culvert/internal/api"
	"culvert/internal/daemon"
	"culvert/internal/httpd"
	"culvert/subnet"
	"culvert/subnet/etcd"
	"culvert/subnet/etcd/embedded"
)

// etcdFlags are the flags of the commands that use etcd.
type etcdFlags struct {
	endpoints    []string
	prefix       string
	ca           string
	cert         string
	key          string
	user         string
	password     string
	passwordFile string
}

func (f *etcdFlags) addTo(flags *pflag.FlagSet) {
	flags.StringSliceVar(&f.endpoints, "etcd-endpoints", []string{"http://127.0.0.1:2379"}, "etcd servers, separated by commas")
	flags.StringVar(&f.prefix, "etcd-prefix", etcd.DefaultPrefix, "etcd prefix of the network's keys")
	flags.StringVar(&f.ca, "etcd-cafile", "", "CA that signed the servers' certificates (PEM)")
	flags.StringVar(&f.cert, "etcd-certfile", "", "client certificate (PEM)")
	flags.StringVar(&f.key, "etcd-keyfile", "", "its key (PEM)")
	flags.StringVar(&f.user, "etcd-username", "", "user, if etcd requires authentication")
	flags.StringVar(&f.password, "etcd-password", "", "its password; prefer the file or CULVERT_ETCD_PASSWORD, since command lines are visible to other users")
	flags.StringVar(&f.passwordFile, "etcd-password-file", "", "file that holds the password")
}

func (f *etcdFlags) options(log *slog.Logger) (etcd.Options, error) {
	o := etcd.Options{
		Endpoints: f.endpoints, Prefix: f.prefix,
		CAFile: f.ca, CertFile: f.cert, KeyFile: f.key,
		User: f.user, Password: f.password, PasswordFile: f.passwordFile, Logger: log,
	}
	if o.PasswordFile != "" {
		o.Password = "" // may be from the environment; the file takes precedence
	}
	return o, nil
}

// addQuarantine adds the flag of the commands that free or lease subnets.
func addQuarantine(flags *pflag.FlagSet, d *time.Duration) {
	flags.DurationVar(d, "quarantine", time.Hour, "how long a freed subnet is not given to another node while other subnets are free; 0: not at all")
}

// runFlags are the flags of culvert run.
type runFlags struct {
	etcd        etcdFlags
	node        string
	store       string
	kube        kubeFlags
	runDir      string
	subnetFile  string
	cniConfDir  string
	iface       []string
	ifaceRegex  []string
	canReach    string
	publicIP    string
	publicIPv6  string
	ipMasq      bool
	noMasq      []string
	probePeers  bool
	probeEvery  time.Duration
	takeOver    bool
	leaseTTL    time.Duration
	quarantine  time.Duration
	onLost      string
	release     bool
	jitter      time.Duration
	datapath    string
	fastPath    string
	metrics     string
	replace     bool
	handedOver  string
	access      httpd.Access
	socketGroup string
	confine     string
	logLevel    string
	logFormat   string
	tunnel      daemon.Tuning
	embedded    bool
	etcdDataDir string
	etcdListen  string
	etcdServer  struct{ cert, key, clientCA string }
}

func newRunCommand() *cobra.Command {
	var f runFlags
	c := &cobra.Command{
		Use:   "run",
		Short: "Run the node daemon",
		Long: `Run the node daemon: lease a subnet from etcd, or take the podCIDR that
Kubernetes gave this node, tell the CNI plugin about it in subnet.env, and carry
pods' packets to the other nodes.

Every flag can be given as an environment variable: --etcd-endpoints is
CULVERT_ETCD_ENDPOINTS.`,
		Example: `  # on a node of a cluster that has etcd
  culvert run --etcd-endpoints https://10.0.0.1:2379 --etcd-cafile /etc/culvert/ca.pem

  # a small site without etcd: the first VM runs it, the others use it
  culvert run --embedded-etcd --etcd-listen 10.0.0.1:2379
  culvert run --etcd-endpoints http://10.0.0.1:2379`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			o, err := f.options(c)
			if err != nil {
				return err
			}
			return daemon.Run(c.Context(), o)
		},
	}
	flags := c.Flags()
	flags.SortFlags = false
	f.etcd.addTo(flags)
	flags.StringVar(&f.store, "store", "auto", "store for leases: etcd, kubernetes (like flannel's --kube-subnet-mgr) or auto: kubernetes in a pod with a service account and without --etcd-endpoints, else etcd")
	f.kube.addTo(flags)
	flags.StringVar(&f.node, "node-id", "", "stable identity of this node (default: the machine id; with --store=kubernetes NODE_NAME, or the Node of POD_NAME in POD_NAMESPACE)")
	flags.StringSliceVar(&f.iface, "iface", nil, "underlay interface, by name or address; of several, the first with an address of each required family")
	flags.StringSliceVar(&f.ifaceRegex, "iface-regex", nil, "underlay interface, by a regular expression on its name or address")
	flags.StringVar(&f.canReach, "iface-can-reach", "", "underlay interface: the one that reaches this address")
	flags.StringVar(&f.publicIP, "public-ip", "", "address that other nodes send to, if it differs from the interface's; one per family, separated by a comma")
	flags.StringVar(&f.publicIPv6, "public-ipv6", "", "the IPv6 address that other nodes send to (flannel's flag)")
	flags.StringVar(&f.runDir, "run-dir", api.DefaultRunDir, "directory of the socket, the state files and subnet.env")
	flags.StringVar(&f.subnetFile, "subnet-file", "", "path of subnet.env (default: in --run-dir)")
	flags.StringVar(&f.cniConfDir, "cni-conf-dir", "", "CNI directory in which to activate the configuration that 'culvert cni install --when-ready' left (default: none)")
	flags.BoolVar(&f.ipMasq, "ip-masq", true, "masquerade traffic that leaves the cluster network")
	flags.StringSliceVar(&f.noMasq, "no-masq-cidrs", nil, "networks outside the cluster to which traffic is not masqueraded")
	flags.DurationVar(&f.leaseTTL, "lease-ttl", 24*time.Hour, "lifetime of the lease without renewal in etcd")
	addQuarantine(flags, &f.quarantine)
	flags.StringVar(&f.onLost, "on-lost", string(daemon.Fence), "when another node has taken our subnet: fence (wait until its pods are gone) or release (lease another at once)")
	flags.BoolVar(&f.release, "release-on-exit", false, "release the lease on exit, for a node that does not return")
	flags.DurationVar(&f.jitter, "start-jitter", 0, "maximum random delay before the first request to the store, when thousands of nodes boot at once")
	flags.StringVar(&f.datapath, "datapath", string(daemon.Auto), "datapath: "+strings.Join(daemon.Datapaths(), ", "))
	flags.StringVar(&f.fastPath, "fast-path", "auto", "eBPF fast path: auto (with the kernel's vxlan device, if kernel and host allow it; established TCP and UDP between pods bypass the host's stack unless its rules depend on seeing each packet), on (with the userspace datapath and IPIP too; all packets pass the host), off, or pod (auto, whatever the host's rules)")
	flags.BoolVar(&f.takeOver, "take-over-flannel", false, "replace flannel's device once the lease is acquired (stop flanneld first)")
	flags.BoolVar(&f.replace, "replace", false, "take over without packet loss from the daemon that runs with this --run-dir, if there is one")
	flags.StringVar(&f.handedOver, "handed-over", string(daemon.Exit), "after another daemon has taken over: exit, or wait for a signal (under a supervisor that would restart it, such as the kubelet)")
	flags.StringVar(&f.metrics, "metrics", "127.0.0.1:9472", "listen address for /metrics, /livez, /readyz and the page; empty: none")
	flags.StringVar(&f.access.CertFile, "metrics-certfile", "", "certificate for --metrics (PEM); enables https")
	flags.StringVar(&f.access.KeyFile, "metrics-keyfile", "", "key of --metrics-certfile (PEM)")
	flags.StringVar(&f.access.TokenFile, "metrics-token-file", "", "file with the bearer token that /metrics requires")
	flags.StringVar(&f.socketGroup, "socket-group", "", "group that may use the daemon's socket (culvert status), besides root")
	flags.StringVar(&f.confine, "confine", string(daemon.ConfineOn), "drop capabilities and filter system calls that the daemon does not need: on, off, or kill (terminate at such a call, for tests)")
	flags.StringVar(&f.logLevel, "log-level", "info", "debug, info, warn or error")
	flags.StringVar(&f.logFormat, "log-format", "text", "text or json")
	flags.BoolVar(&f.tunnel.NoGSO, "no-gso", false, "do not segment datagrams in the kernel on send (UDP_SEGMENT)")
	flags.BoolVar(&f.tunnel.NoGRO, "no-gro", false, "do not coalesce received packets of a flow (GRO)")
	flags.BoolVar(&f.tunnel.NoUSO, "no-uso", false, "do not coalesce received UDP packets")
	flags.BoolVar(&f.tunnel.NoSuperFrame, "no-super-frame", false, "do not send large frames for the uplink to segment")
	flags.BoolVar(&f.tunnel.NoMultiQueue, "no-multi-queue", false, "use one queue for the tunnel device, regardless of the number of CPUs")
	flags.BoolVar(&f.tunnel.NoBusyPoll, "no-busy-poll", false, "block as soon as there is no packet; saves CPU time, adds latency")
	flags.BoolVar(&f.tunnel.Priority, "priority", false, "in userspace, run the daemon at nice -10: lower latency beside bulk, fewer small packets")
	flags.IntVar(&f.tunnel.Queues, "queues", 0, "queues of the tunnel device, one thread each (default: number of CPUs less one, at most 8)")
	flags.IntVar(&f.tunnel.SourcePorts, "source-ports", 0, "number of UDP source ports to spread flows over (default: 8; on two CPUs 1)")
	flags.BoolVar(&f.probePeers, "probe-peers", true, "probe peers with echo requests through the tunnel, at most 96 in 30 s, for 'culvert peers'")
	flags.DurationVar(&f.probeEvery, "probe-interval", daemon.ProbeInterval, "interval of these requests, to measure what they cost")
	_ = flags.MarkHidden("probe-interval")
	flags.BoolVar(&f.tunnel.CopyDSCP, "copy-dscp", false, "copy the DSCP field to the outer header")
	flags.BoolVar(&f.tunnel.DontFragment, "df", false, "set DF on VXLAN packets and follow the path MTU")
	flags.BoolVar(&f.embedded, "embedded-etcd", false, "run an etcd server in this daemon, for a site without one")
	flags.StringVar(&f.etcdDataDir, "etcd-data-dir", "/var/lib/culvert/etcd", "data directory of the embedded etcd")
	flags.StringVar(&f.etcdListen, "etcd-listen", "127.0.0.1:2379", "listen address of the embedded etcd")
	flags.StringVar(&f.etcdServer.cert, "etcd-server-certfile", "", "certificate of the embedded etcd (PEM); enables https")
	flags.StringVar(&f.etcdServer.key, "etcd-server-keyfile", "", "key of --etcd-server-certfile (PEM)")
	flags.StringVar(&f.etcdServer.clientCA, "etcd-server-client-cafile", "", "CA of client certificates that the embedded etcd requires (PEM)")
	for name, values := range map[string][]string{
		"store": {"auto", "etcd", "kubernetes"}, "datapath": daemon.Datapaths(), "fast-path": {"auto", "on", "off", "pod"}, "on-lost": {"fence", "release"}, "handed-over": {"exit", "wait"}, "confine": {"on", "off", "kill"}, "log-level": {"debug", "info", "warn", "error"}, "log-format": {"text", "json"},
	} {
		_ = c.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	}
	return c
}

// options checks the flags and converts them to the daemon's options.
func (f *runFlags) options(c *cobra.Command) (daemon.Options, error) {
	var recent api.Ring
	log, err := newLogger(io.MultiWriter(c.ErrOrStderr(), &recent), f.logLevel, f.logFormat)
	if err != nil {
		return daemon.Options{}, err
	}
	o := daemon.Options{
		Version: Version(), Node: f.node, RunDir: f.runDir, SubnetFile: f.subnetFile, CNIConfDir: f.cniConfDir,
		IPMasq: f.ipMasq, LeaseTTL: f.leaseTTL, OnLost: daemon.OnLost(f.onLost), ReleaseOnExit: f.release, StartJitter: f.jitter,
		Datapath: daemon.Datapath(f.datapath), FastPath: daemon.FastPath(f.fastPath), Metrics: f.metrics, MetricsAccess: f.access,
		Tunnel: f.tunnel, Log: log, ProbeInterval: f.probeEvery, Recent: &recent,
		TakeOverFlannel: f.takeOver, Replace: f.replace, HandedOver: daemon.HandedOver(f.handedOver),
		SocketGroup: f.socketGroup, Confine: daemon.Confine(f.confine),
	}
	if o.SubnetFile == "" {
		o.SubnetFile = filepath.Join(f.runDir, "subnet.env")
	}
	if f.leaseTTL < 5*time.Second {
		return o, usagef("--lease-ttl %s: at least 5s", f.leaseTTL)
	}
	if !f.probePeers {
		o.ProbeInterval = 0
	}
	switch {
	case f.probeEvery < 100*time.Millisecond:
		return o, usagef("--probe-interval %s: at least 100ms", f.probeEvery)
	case f.quarantine < 0:
		return o, usagef("--quarantine %s: a duration, or 0 for none", f.quarantine)
	case f.jitter < 0:
		return o, usagef("--start-jitter %s: a duration, or 0 for none", f.jitter)
	case o.OnLost != daemon.Fence && o.OnLost != daemon.Release:
		return o, usagef("--on-lost %s: fence or release", f.onLost)
	case o.HandedOver != daemon.Exit && o.HandedOver != daemon.Wait:
		return o, usagef("--handed-over %s: exit or wait", f.handedOver)
	}
	if q := f.tunnel.Queues; q < 0 || q > 64 {
		return o, usagef("--queues %d: 1 to 64, or 0 for the default", q)
	}
	if n := f.tunnel.SourcePorts; n < 0 || n > 16 {
		return o, usagef("--source-ports %d: 1 to 16, or 0 for the default", n)
	}
	if !slices.Contains(daemon.Datapaths(), f.datapath) {
		return o, usagef("--datapath %s: one of %s", f.datapath, strings.Join(daemon.Datapaths(), ", "))
	}
	switch f.fastPath {
	case "auto", "on", "off", "pod":
	default:
		return o, usagef("--fast-path %s: auto, on, off or pod", f.fastPath)
	}
	if (f.access.CertFile == "") != (f.access.KeyFile == "") {
		return o, usagef("--metrics-certfile and --metrics-keyfile go together")
	}
	switch o.Confine {
	case daemon.ConfineOn, daemon.ConfineOff, daemon.ConfineKill:
	default:
		return o, usagef("--confine %s: on, off or kill", f.confine)
	}
	for _, text := range f.noMasq {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return o, usagef("--no-masq-cidrs: %w", err)
		}
		o.NoMasq = append(o.NoMasq, p.Masked())
	}
	inKubernetes, err := f.inKubernetes(c)
	if err != nil {
		return o, err
	}
	if inKubernetes {
		if o.Kubernetes, err = f.kube.options(c.Context(), &o, log); err != nil {
			return o, err
		}
	}
	if o.Node == "" {
		if o.Node, err = machineID(); err != nil {
			return o, err
		}
	}
	if err := subnet.CheckNode(o.Node); err != nil {
		return o, usagef("--node-id: %w", err)
	}
	if err := f.underlay(&o); err != nil {
		return o, err
	}
	if o.Etcd, err = f.etcd.options(log); err != nil {
		return o, err
	}
	o.Etcd.Quarantine = f.quarantine
	o.Etcd.StateFile = filepath.Join(f.runDir, "lease.json")
	o.Etcd.SnapshotFile = filepath.Join(f.runDir, "snapshot.json")
	if f.embedded {
		if err := f.embed(&o, c.Flags().Changed("etcd-endpoints")); err != nil {
			return o, err
		}
	}
	return o, nil
}

// embed adds the embedded etcd. The daemon uses it unless endpoints are given.
func (f *runFlags) embed(o *daemon.Options, endpointsGiven bool) error {
	listen, err := netip.ParseAddrPort(f.etcdListen)
	if err != nil {
		return usagef("--etcd-listen %s: an address and a port, such as 10.0.0.1:2379", f.etcdListen)
	}
	scheme := "http://"
	args := []string{"--data-dir", f.etcdDataDir, "--listen-client", f.etcdListen}
	if f.etcdServer.cert != "" {
		scheme = "https://"
		args = append(args, "--cert-file", f.etcdServer.cert, "--key-file", f.etcdServer.key)
		if f.etcdServer.clientCA != "" {
			args = append(args, "--client-ca-file", f.etcdServer.clientCA)
		}
	} else if !listen.Addr().IsLoopback() {
		o.Log.Warn("the embedded etcd serves anyone who can reach it, unencrypted: use it on a trusted network, or with --etcd-server-certfile", "listen", listen)
	}
	if !endpointsGiven {
		at := listen
		if at.Addr().IsUnspecified() {
			at = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), at.Port())
		}
		o.Etcd.Endpoints = []string{scheme + at.String()}
	}
	program, err := embedded.Find()
	if err != nil {
		return err
	}
	o.Embedded = &embedded.Server{Program: program, Args: args}
	return nil
}

func (f *runFlags) underlay(o *daemon.Options) error {
	o.Underlay.Interfaces, o.Underlay.Regexes = f.iface, f.ifaceRegex
	var err error
	if f.canReach != "" {
		if o.Underlay.CanReach, err = netip.ParseAddr(f.canReach); err != nil {
			return usagef("--iface-can-reach: %w", err)
		}
	}
	// --public-ip accepts either family and lists, since it may be set from a pod's
	// status.hostIP or status.hostIPs.
	for _, p := range []struct{ flag, text string }{{"public-ip", f.publicIP}, {"public-ipv6", f.publicIPv6}} {
		for text := range strings.SplitSeq(p.text, ",") {
			if text = strings.TrimSpace(text); text == "" {
				continue
			}
			a, err := netip.ParseAddr(text)
			a = a.Unmap()
			switch {
			case err != nil || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a.Is6() && a.IsLinkLocalUnicast():
				return usagef("--%s %s: not an address that other nodes can send to", p.flag, text)
			case p.flag == "public-ipv6" && a.Is4():
				return usagef("--public-ipv6 %s: an IPv4 address; give it with --public-ip", text)
			case slices.ContainsFunc(o.PublicIPs, func(b netip.Addr) bool { return a != b && a.Is4() == b.Is4() }):
				return usagef("--%s %s: a second address of its family", p.flag, text)
			case !slices.Contains(o.PublicIPs, a):
				o.PublicIPs = append(o.PublicIPs, a)
			}
		}
	}
	slices.SortFunc(o.PublicIPs, netip.Addr.Compare) // IPv4 first
	o.Underlay.PublicIPs = o.PublicIPs
	return nil
}

// machineID returns the default node identity (machine-id(5)).
func machineID() (string, error) {
	for _, path := range []string{"/etc/machine-id", "/var/lib/dbus/machine-id"} {
		b, err := os.ReadFile(path)
		if id := strings.TrimSpace(string(b)); err == nil && id != "" {
			return id, nil
		}
	}
	return "", fmt.Errorf("this machine has no machine id (`systemd-machine-id-setup` makes one): name the node with --node-id")
}

func newLogger(w io.Writer, level, format string) (*slog.Logger, error) {
	var o slog.HandlerOptions
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, usagef("--log-level %s: debug, info, warn or error", level)
	}
	o.Level = l
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w, &o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, &o)), nil
	}
	return nil, usagef("--log-format %s: text or json", format)
}
