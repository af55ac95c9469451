package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"culvert/internal/api"
	"culvert/internal/daemon"
	"culvert/internal/report"
)

func newReportCommand() *cobra.Command {
	var o doctorOptions
	var root string
	c := &cobra.Command{
		Use:   "report [FILE]",
		Short: "Collect the data for a bug report in one archive, without secrets",
		Long: `Write the state of culvert and of the kernel on this node to one .tar.gz: version,
status, doctor's findings, state files, configuration, the daemon's command line, links,
addresses, routes, rules, neighbours, FDB, nftables and iptables rules, kernel
settings, logs, metrics. Passwords, tokens, keys and certificates are removed;
addresses and names are not. The archive has at most some tens of megabytes. The command
takes less than a minute, and needs no running daemon. FILE "-" is standard output.`,
		Example: `  culvert report
  culvert report - | ssh admin@example.com 'cat >n1.tar.gz'`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			name := fmt.Sprintf("culvert-report-%s-%s", hostname(), time.Now().UTC().Format("20060102-150405"))
			file := name + ".tar.gz"
			if len(args) > 0 {
				file = args[0]
			}
			options := o.report(c.Context(), name, root)
			if file == "-" {
				_, err := report.Write(c.Context(), c.OutOrStdout(), options)
				return err
			}
			var b bytes.Buffer
			done := whileWaiting(c, "collecting; this takes some seconds")
			sum, err := report.Write(c.Context(), &b, options)
			done()
			if err == nil {
				err = os.WriteFile(file, b.Bytes(), 0o600)
			}
			if err != nil {
				return fmt.Errorf("writing the report: %w", err)
			}
			if len(sum.Programs) > 0 {
				fmt.Fprintf(c.OutOrStdout(), "not installed here: %s. Their output was replaced by what culvert can read from the kernel; README.txt lists what is missing.\n", strings.Join(sum.Programs, ", "))
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "%s: %d files, %s; %d secrets were removed. Review it before you publish it.\n", file, sum.Files, size(uint64(b.Len())), sum.Removed)
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&o.runDir, "run-dir", api.DefaultRunDir, "the daemon's --run-dir")
	f.Uint16Var(&o.port, "port", 8472, "the tunnel's UDP port")
	f.StringVar(&o.cni.BinDir, "cni-bin-dir", "/opt/cni/bin", "the container runtime's directory of plugins")
	f.StringVar(&o.cni.ConfDir, "cni-conf-dir", "/etc/cni/net.d", "the container runtime's directory of network configurations")
	f.BoolVar(&o.noProbe, "no-probe", false, "send no packets to other nodes")
	f.StringVar(&root, "root", "", "")
	_ = f.MarkHidden("root")
	return c
}

// report returns the sources of the archive.
func (o doctorOptions) report(ctx context.Context, name, root string) report.Options {
	r := report.Options{Name: name, Root: root, RunDir: o.runDir, CNI: o.cni.ConfDir}
	asking, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	status, err := api.GetStatus(asking, o.runDir)
	if err == nil {
		if text, err := os.ReadFile(filepath.Join(o.runDir, "lock")); err == nil {
			r.PID, _ = strconv.Atoi(strings.TrimSpace(string(text))) // 0: unknown
		}
	}
	add := func(file string, read func(context.Context) ([]byte, error)) {
		r.First = append(r.First, report.Source{Name: file, Read: read})
	}
	shown := func(what func(io.Writer) error) ([]byte, error) {
		var b bytes.Buffer
		err := what(&b)
		return b.Bytes(), err
	}
	add("version.txt", func(context.Context) ([]byte, error) { return fmt.Appendf(nil, "culvert %s\n", Version()), nil })
	if err == nil {
		add("status.json", func(context.Context) ([]byte, error) {
			return shown(func(w io.Writer) error { return writeJSON(w, status) })
		})
		add("status.txt", func(context.Context) ([]byte, error) {
			return shown(func(w io.Writer) error { return writeStatus(w, status, nil, time.Now()) })
		})
		add("logs/daemon.txt", func(ctx context.Context) ([]byte, error) { return api.GetLog(ctx, o.runDir) })
	} else {
		add("status.txt", func(context.Context) ([]byte, error) { return []byte(err.Error() + "\n"), nil })
	}
	// Examine first: it may take longer than a source's timeout.
	examining, stop := context.WithTimeout(ctx, 20*time.Second)
	defer stop()
	results, _ := o.examine(examining)
	add("doctor.json", func(context.Context) ([]byte, error) {
		return shown(func(w io.Writer) error { return writeJSON(w, results) })
	})
	add("doctor.txt", func(context.Context) ([]byte, error) {
		return shown(func(w io.Writer) error { return writeDoctor(w, results) })
	})
	add("cni.json", func(ctx context.Context) ([]byte, error) {
		return shown(func(w io.Writer) error { return writeJSON(w, o.install().Status(ctx)) })
	})
	if told, err := daemon.LoadOptions(o.runDir); err == nil && told != nil && told.Metrics != "" && r.PID != 0 {
		add("metrics.txt", func(ctx context.Context) ([]byte, error) { return fetch(ctx, "http://"+told.Metrics+"/metrics") })
	}
	return r
}

func fetch(ctx context.Context, url string) ([]byte, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return nil, err
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		return nil, err
	}
	defer func() { _ = answer.Body.Close() }()
	if answer.StatusCode != http.StatusOK {
		return nil, errors.New(answer.Status)
	}
	return io.ReadAll(io.LimitReader(answer.Body, 8<<20))
}

func hostname() string {
	name, err := os.Hostname()
	if err != nil || name == "" {
		return "node"
	}
	return strings.Map(func(r rune) rune {
		if r == '/' || r < ' ' {
			return '-'
		}
		return r
	}, name)
}
