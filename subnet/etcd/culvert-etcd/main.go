// Command culvert-etcd is an etcd server of one member, for a site that has
// none: culvert run --embedded-etcd and culvert demo start it. It prints
// "ready <client URL>" on standard output when it serves, and stops in order
// on SIGTERM or SIGINT.
//
// Exit codes: 0 after a signal, 1 when the server failed, 2 for wrong flags.
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
	flags.StringVar(&o.DataDir, "data-dir", "", "directory of the store (required)")
	flags.StringVar(&o.ListenClient, "listen-client", "127.0.0.1:2379", "host:port for clients; port 0 takes a free one")
	flags.StringVar(&o.AdvertiseClient, "advertise-client", "", "URL that other nodes reach it by (default: the one it listens on)")
	flags.StringVar(&o.ListenPeer, "listen-peer", "127.0.0.1:0", "host:port for other members")
	flags.StringVar(&o.Name, "name", "culvert", "the member's name; it stays the same for one data directory")
	flags.StringVar(&o.InitialCluster, "initial-cluster", "", "members of a new cluster, this one too: name=http://host:port,... of --listen-peer (default: this one alone)")
	flags.UintVar(&o.TickMs, "heartbeat-interval", 100, "milliseconds between heartbeats; elections take ten times as long")
	flags.StringVar(&o.CertFile, "cert-file", "", "certificate of the client listener (PEM); makes it https")
	flags.StringVar(&o.KeyFile, "key-file", "", "its key (PEM)")
	flags.StringVar(&o.CAFile, "client-ca-file", "", "CA that client certificates are demanded of and verified with (PEM)")
	flags.StringVar(&o.LogLevel, "log-level", "error", "debug, info, warn, error, panic or fatal; on standard error")
	flags.BoolVar(&o.UnsafeNoFsync, "unsafe-no-fsync", false, "do not wait for the disk; data may be lost over a power cut")
	flags.DurationVar(&timeout, "start-timeout", time.Minute, "how long the start may take")
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprintln(stdout, "culvert-etcd runs an etcd server of one member. Flags:")
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
		return fmt.Errorf("say that it serves: %w", err)
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-m.Err():
		return fmt.Errorf("etcd ended: %w", err)
	}
}
