// Command culvert-etcd is a single-member etcd server for sites that have no etcd.
// culvert run --embedded-etcd and culvert demo start it. It prints "ready <client
// URL>" on standard output when it is ready, and shuts down on SIGTERM or SIGINT.
//
// Exit codes: 0 after a signal, 1 if the server failed, 2 for invalid flags.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"culvert/subnet/etcd/member"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var o member.Options
	var timeout time.Duration
	flags := flag.NewFlagSet("culvert-etcd", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&o.DataDir, "data-dir", "", "data directory (required)")
	flags.StringVar(&o.ListenClient, "listen-client", "127.0.0.1:2379", "host:port for clients; port 0 takes a free one")
	flags.StringVar(&o.AdvertiseClient, "advertise-client", "", "client URL for other nodes (default: the one it listens on)")
	flags.StringVar(&o.ListenPeer, "listen-peer", "127.0.0.1:0", "host:port for other members")
	flags.StringVar(&o.Name, "name", "culvert", "name of the member; must not change for a data directory")
	flags.StringVar(&o.InitialCluster, "initial-cluster", "", "members of a new cluster, including this one: name=http://host:port,... of their --listen-peer (default: only this one)")
	flags.UintVar(&o.TickMs, "heartbeat-interval", 100, "heartbeat interval in milliseconds; the election timeout is ten times as long")
	flags.StringVar(&o.CertFile, "cert-file", "", "certificate of the client listener (PEM); enables https")
	flags.StringVar(&o.KeyFile, "key-file", "", "key of --cert-file (PEM)")
	flags.StringVar(&o.CAFile, "client-ca-file", "", "require client certificates signed by this CA (PEM)")
	flags.StringVar(&o.LogLevel, "log-level", "error", "debug, info, warn, error, panic or fatal; on standard error")
	flags.BoolVar(&o.UnsafeNoFsync, "unsafe-no-fsync", false, "do not fsync; a power failure may lose data")
	flags.DurationVar(&timeout, "start-timeout", time.Minute, "how long to wait until the server is ready")
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprintln(stdout, "culvert-etcd runs a single-member etcd server. Flags:")
		flags.SetOutput(stdout)
		flags.PrintDefaults()
		return 0
	case err == nil && flags.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case err == nil && o.DataDir == "":
		err = errors.New("--data-dir is missing")
	}
	if err != nil {
		fmt.Fprintf(stderr, "culvert-etcd: %v; see culvert-etcd --help\n", err)
		return 2
	}
	o.Log = stderr
	if err := serve(ctx, o, timeout, stdout); err != nil {
		fmt.Fprintf(stderr, "culvert-etcd: %v\n", err)
		return 1
	}
	return 0
}

func serve(ctx context.Context, o member.Options, timeout time.Duration, stdout io.Writer) error {
	sctx, cancel := context.WithTimeout(ctx, timeout)
	m, err := member.Start(sctx, o)
	cancel()
	if ctx.Err() != nil {
		if m != nil {
			m.Stop()
		}
		return nil
	}
	if err != nil {
		return err
	}
	defer m.Stop()
	if _, err := fmt.Fprintln(stdout, "ready", m.URL()); err != nil {
		return fmt.Errorf("report readiness: %w", err)
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-m.Err():
		return fmt.Errorf("etcd failed: %w", err)
	}
}
