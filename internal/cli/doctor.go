package cli

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"culvert/cni"
	"culvert/internal/api"
	"culvert/internal/doctor"
)

// doctorOptions are the flags of culvert doctor.
type doctorOptions struct {
	runDir    string
	endpoints []string
	port      uint16
	cni       cni.Install
	noCNI     bool
	noProbe   bool
	out       output
}

func newDoctorCommand() *cobra.Command {
	var o doctorOptions
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Examine this host for what keeps packets from passing, and say what mends it",
		Long: `Examine this host: privileges, kernel, daemon, store, the tunnel's port, leftovers
of other overlays, network managers, connection tracking, clock, the container
runtime's configuration; and, if a daemon runs, every node through the tunnel
with packets as large as pods may send. Each finding has its evidence and its fix.
Nothing is changed.

Exit code 1: something keeps packets from passing, or pods from being added.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			results := o.examine(c.Context())
			if err := c.Context().Err(); err != nil {
				return err
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
	f.StringSliceVar(&o.endpoints, "etcd-endpoints", nil, "etcd servers to dial, where no daemon says which")
	f.Uint16Var(&o.port, "port", 8472, "the tunnel's UDP port")
	f.StringVar(&o.cni.BinDir, "cni-bin-dir", "/opt/cni/bin", "the container runtime's directory of plugins")
	f.StringVar(&o.cni.ConfDir, "cni-conf-dir", "/etc/cni/net.d", "the container runtime's directory of network configurations")
	f.BoolVar(&o.noCNI, "no-cni", false, "do not look at the container runtime's configuration")
	f.BoolVar(&o.noProbe, "no-probe", false, "send no packets to other nodes")
	o.out.addTo(f)
	return c
}

// examine runs the checks, and the pings if a daemon says of whom.
func (o doctorOptions) examine(ctx context.Context) []doctor.Result {
	h := doctor.Host{Endpoints: o.endpoints, Port: o.port}
	asking, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if s, err := api.GetStatus(asking, o.runDir); err == nil {
		h.Status = &s
		if len(h.Endpoints) == 0 {
			h.Endpoints = s.Store.Endpoints
		}
	} else {
		h.NoDaemon = err
	}
	if !o.noCNI {
		install := o.cni
		install.ConfName, install.RunDir = cniConfName, o.runDir
		install.From = filepath.Dir(install.BinDir)
		h.CNI = install.Status(asking).NotReady
	}
	results := doctor.Examine(ctx, h)
	if h.Status != nil && !o.noProbe {
		results = append(results, probeNodes(ctx, *h.Status))
	}
	return results
}

// probeNodes pings every node through the tunnel.
func probeNodes(ctx context.Context, s api.Status) doctor.Result {
	r := doctor.Result{Check: "peer-unreachable", Title: "other nodes"}
	o := pingOptions{count: 2, interval: 50 * time.Millisecond, patience: time.Second}
	targets, _ := pingTargets(s, nil) // without arguments no error
	pings, err := o.pingAll(ctx, s, targets)
	if err != nil {
		r.Findings = []doctor.Finding{{Severity: doctor.Risk, Warning: api.Warning{Check: r.Check, Text: err.Error()}}}
		return r
	}
	well := 0
	for _, p := range pings {
		if p.Problem == "" {
			well++
			continue
		}
		f := doctor.Finding{Severity: doctor.Bad, Warning: api.Warning{
			Check: r.Check, Text: strings.TrimSpace(p.Node+" "+p.Addr.String()) + ": " + p.Problem,
			Fix: "run `culvert doctor` on that node too, and see the firewalls between",
		}}
		if p.Answered > 0 && p.MTU < p.WantMTU {
			f.Check, f.Fix = "path-mtu", "give the network a smaller Backend.MTU (`culvert config set`), or mend the link on the way"
		}
		r.Findings = append(r.Findings, f)
	}
	if len(r.Findings) == 0 {
		r.Seen = fmt.Sprintf("%d answer with packets of %d bytes", well, s.Datapath.MTU)
		if len(pings) == 0 {
			r.Seen = "there are none"
		}
	}
	return r
}

func writeDoctor(w io.Writer, results []doctor.Result) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
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
