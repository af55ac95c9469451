package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"culvert/cni"
	"culvert/internal/api"
	"culvert/internal/daemon"
	"culvert/internal/doctor"
	"culvert/internal/host"
)

// doctorOptions are the flags of culvert doctor.
type doctorOptions struct {
	runDir    string
	endpoints []string
	port      uint16
	cni       cni.Install
	noCNI     bool
	noProbe   bool
	list      bool
	fix       bool
	yes       bool
	out       output
}

func newDoctorCommand() *cobra.Command {
	var o doctorOptions
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Find what stops packets on this host, and how to fix it",
		Long: `Examine this host: privileges, kernel, daemon, store, the tunnel's port, leftovers
of other overlays, network managers, connection tracking, clock, the container
runtime's configuration. If a daemon runs, its warnings are included, and every node
is probed through the tunnel with packets as large as pods may send. If none runs,
the devices, routes, rules and settings that the last daemon made are compared with the
host's, and other programs' firewalls are checked. Each finding has its evidence and
its fix.

Nothing is changed without --fix. With it, doctor repairs what a daemon would repair,
and raises kernel limits. Objects and configuration of other programs are changed only
with --yes, else listed. Each command is printed.

Exit code 1: something keeps packets from passing, or pods from being added.`,
		Example: `  culvert doctor
  culvert doctor --list
  culvert doctor --fix`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if o.yes && !o.fix {
				return usagef("--yes needs --fix")
			}
			if o.list {
				return o.out.write(c.OutOrStdout(), api.Checks(), func(w io.Writer) error { return writeChecks(w) })
			}
			done := whileWaiting(c, "examining this host, and probing the other nodes; silent ones take seconds")
			results, diagnosis := o.examine(c.Context())
			done()
			if err := c.Context().Err(); err != nil {
				return err
			}
			if o.fix {
				tell := c.OutOrStdout()
				if o.out != "table" {
					tell = c.ErrOrStderr()
				}
				if err := o.mend(c.Context(), tell, results, diagnosis); err != nil {
					return err
				}
				results, _ = o.examine(c.Context())
			}
			if err := o.out.write(c.OutOrStdout(), results, func(w io.Writer) error { return writeDoctor(w, results) }); err != nil {
				return err
			}
			for _, r := range results {
				for _, f := range r.Findings {
					if f.Severity == doctor.Bad {
						return errReported
					}
				}
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&o.runDir, "run-dir", api.DefaultRunDir, "the daemon's --run-dir")
	f.StringSliceVar(&o.endpoints, "etcd-endpoints", nil, "etcd servers to check if no daemon runs")
	f.Uint16Var(&o.port, "port", 8472, "the tunnel's UDP port")
	f.StringVar(&o.cni.BinDir, "cni-bin-dir", "/opt/cni/bin", "the container runtime's directory of plugins")
	f.StringVar(&o.cni.ConfDir, "cni-conf-dir", "/etc/cni/net.d", "the container runtime's directory of network configurations")
	f.BoolVar(&o.noCNI, "no-cni", false, "do not look at the container runtime's configuration")
	f.BoolVar(&o.noProbe, "no-probe", false, "send no packets to other nodes")
	f.BoolVar(&o.list, "list", false, "list the checks, and examine nothing")
	f.BoolVar(&o.fix, "fix", false, "repair the findings that can be repaired")
	f.BoolVar(&o.yes, "yes", false, "with --fix: also change other programs' objects and configuration")
	o.out.addTo(c)
	return c
}

// examine runs the checks, and if a daemon runs, the pings to its peers. The diagnosis is
// set only if no daemon runs.
func (o doctorOptions) examine(ctx context.Context) ([]doctor.Result, daemon.Diagnosis) {
	h := doctor.Host{Endpoints: o.endpoints, Port: o.port}
	var diagnosis daemon.Diagnosis
	asking, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if s, err := api.GetStatusNow(asking, o.runDir); err == nil {
		h.Status = &s
		h.SubnetFile, h.Underlay, h.Addrs = s.SubnetFile, s.Underlay.Interface, s.Underlay.Addrs
		if len(h.Endpoints) == 0 {
			h.Endpoints = s.Store.Endpoints
		}
	} else {
		h.NoDaemon = err
		diagnosis, err = daemon.Diagnose(ctx, o.runDir)
		if err != nil {
			h.Problems = append(h.Problems, host.Problem{Warning: api.Warning{Check: "host-state", Text: err.Error()}})
		}
		h.Problems = append(h.Problems, diagnosis.Problems...)
		h.Foreseen = diagnosis.Snapshot != nil
		h.Underlay, h.Addrs = diagnosis.Underlay.Name, diagnosis.Underlay.Addrs
		if told := diagnosis.Saved; told != nil {
			h.SubnetFile = told.SubnetFile
			if len(h.Endpoints) == 0 && told.Store == "etcd" {
				h.Endpoints = told.Endpoints
			}
		}
	}
	if !o.noCNI {
		r := o.install().Status(asking)
		h.CNI = r.NotReady
		for _, problem := range r.Problems {
			w := api.Warning{Check: problem.Check, Text: problem.Text, Fix: problem.Fix}
			f := doctor.Finding{Severity: doctor.Bad, Warning: w}
			if problem.Mends {
				f.Severity = doctor.Risk
				f.Repairs = []string{problem.Fix}
			}
			h.CNIProblems = append(h.CNIProblems, f)
		}
	}
	results := doctor.Examine(ctx, h)
	if h.Status != nil && !o.noProbe {
		results = append(results, probeNodes(ctx, *h.Status, h.Port)...)
	}
	return results, diagnosis
}

// install returns the CNI plugin's installation.
func (o doctorOptions) install() cni.Install {
	i := o.cni
	i.ConfName, i.RunDir = cniConfName, o.runDir
	i.From = filepath.Dir(i.BinDir)
	return i
}

// fix repairs the findings that can be repaired, and prints each command.
func (o doctorOptions) mend(ctx context.Context, w io.Writer, results []doctor.Result, diagnosis daemon.Diagnosis) error {
	var failed []error
	tell := func(command string, err error) {
		if err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", command, err))
			return
		}
		fmt.Fprintln(w, "done:", command)
	}
	ours, pods := false, false
	did := make(map[string]bool) // two findings may share an action
	for _, r := range results {
		for _, f := range r.Findings {
			ours = ours || len(f.Repairs) > 0 && r.Check == "host-state"
			pods = pods || len(f.Repairs) > 0 && r.Check == "cni"
			for _, a := range f.Actions {
				switch {
				case did[a.Command]:
				case a.Others && !o.yes:
					fmt.Fprintln(w, "not done, since it is another program's (--yes does it):", a.Command)
				default:
					tell(a.Command, a.Do())
				}
				did[a.Command] = true
			}
		}
	}
	if ours {
		changes, err := diagnosis.Repair()
		for _, c := range changes {
			fmt.Fprintln(w, "done:", c.Command)
		}
		if err != nil {
			failed = append(failed, err)
		}
	}
	if pods {
		done, err := o.install().Mend(ctx)
		for _, command := range done {
			fmt.Fprintln(w, "done:", command)
		}
		if err != nil {
			failed = append(failed, err)
		}
	}
	if len(did) == 0 && !ours && !pods {
		fmt.Fprintln(w, "--fix can repair none of this")
	}
	return errors.Join(failed...)
}

// probeNodes pings every node through the tunnel, and runs more checks on the ones that
// answer and the ones that do not.
func probeNodes(ctx context.Context, s api.Status, port uint16) []doctor.Result {
	r := doctor.Result{Check: "peer-unreachable", Title: "other nodes"}
	o := pingOptions{count: 2, interval: 50 * time.Millisecond, timeout: time.Second}
	targets, _ := pingTargets(s, nil) // never fails without arguments
	pings, err := o.pingAll(ctx, s, targets)
	if err != nil {
		r.Findings = []doctor.Finding{{Severity: doctor.Risk, Warning: api.Warning{Check: r.Check, Text: err.Error()}}}
		return []doctor.Result{r}
	}
	well := 0
	var answering []doctor.RemoteNode
	for _, p := range pings {
		far := doctor.RemoteNode{Node: p.Node, Addr: p.Addr, Public: p.Public}
		if p.Answered > 0 {
			answering = append(answering, far)
		}
		if p.Problem == "" {
			well++
			continue
		}
		f := doctor.Finding{Severity: doctor.Bad, Warning: api.Warning{
			Check: r.Check, Text: strings.TrimSpace(p.Node+" "+p.Addr.String()) + ": " + p.Problem,
			Fix: "run `culvert doctor` on that node too, and check the firewalls between",
		}}
		public := sourceOf(s, from{far.Public.Is4(), false})
		switch {
		case p.Refused:
			f.Fix = fmt.Sprintf("`ip rule`, `ip route get %s` and `ip xfrm policy` show what drops them on this host", p.Addr)
		case p.Answered > 0 && p.MTU < p.WantMTU:
			f.Check, f.Fix = "path-mtu", "give the network a smaller Backend.MTU (`culvert config set`), or repair the link on the path"
		case p.Answered > 0 || s.Datapath.WireFormat != "vxlan" || !far.Public.IsValid():
		case doctor.PortClosed(ctx, public, far, port):
			f.Text += fmt.Sprintf(" (it answers that no program listens on UDP port %d)", port)
			f.Fix = "start culvert on that node, and run `culvert doctor` there"
		case doctor.PortBlocked(ctx, public, far, port):
			f.Check = "port-eaten"
			f.Text += fmt.Sprintf("; the node answers UDP to another port, but not to %d", port)
			f.Fix = fmt.Sprintf("check the firewall of that node (`culvert doctor` there) and those between; if the virtual switch uses the port itself, as VMware NSX does with 8472, set another Backend.Port (`culvert config set`), now %d", port)
		}
		r.Findings = append(r.Findings, f)
	}
	if len(r.Findings) == 0 {
		r.Seen = fmt.Sprintf("%d answer with packets of %d bytes", well, s.Datapath.MTU)
		if len(pings) == 0 {
			r.Seen = "there are none"
		}
	}
	results := []doctor.Result{r}
	if s.Datapath.WireFormat != "host-gw" {
		results = append(results, doctor.Offload(ctx, sourceOf(s, from{is4: true, tunnel: true}), answering, s.Datapath.MTU))
	}
	return results
}

func writeChecks(w io.Writer) error {
	t := newColumns(w)
	for _, c := range api.Checks() {
		severity := "bad"
		if c.Risk {
			severity = "risk"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", c.ID, severity, c.Title)
	}
	return t.Flush()
}

func writeDoctor(w io.Writer, results []doctor.Result) error {
	t := newColumns(w)
	bad, risks := 0, 0
	for _, r := range results {
		if len(r.Findings) == 0 {
			fmt.Fprintf(t, "ok\t%s\t%s\n", r.Title, r.Seen)
		}
		for _, f := range r.Findings {
			mark := "risk"
			if f.Severity == doctor.Bad {
				mark = "BAD"
				bad++
			} else {
				risks++
			}
			fmt.Fprintf(t, "%s\t%s\t%s (%s)\n", mark, r.Title, f.Text, f.Check)
			if f.Fix != "" {
				fmt.Fprintf(t, "\t\tfix: %s\n", f.Fix)
			}
			if len(f.Repairs) > 0 {
				fmt.Fprintf(t, "\t\tculvert does this when it starts; to do it now: culvert doctor --fix\n")
			}
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "%s, %s\n", plural(bad, "problem"), plural(risks, "risk"))
	return err
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
