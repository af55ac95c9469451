package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"
	"testing"
	"time"

	"culvert/internal/lab/labtest"
)

// TestMain makes the test binary also the program that runs parts of datapaths, and the
// server and client of a measurement between hosts.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "bench" {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
		err := play(ctx, os.Args[2], os.Args[3:])
		stop()
		if err != nil {
			fmt.Fprintln(os.Stderr, "culvert:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// By default every process built with -race sleeps for a second when it exits.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE")); err != nil {
		panic(err)
	}
	labtest.Main(m)
}

func play(ctx context.Context, part string, args []string) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	self, err := os.Executable()
	if err != nil {
		return err
	}
	switch part {
	case "node":
		var p Part
		if err := json.Unmarshal([]byte(args[0]), &p); err != nil {
			return err
		}
		return RunNode(ctx, p, os.Stdout, log)
	case "server":
		l, err := net.Listen("tcp", args[0])
		if err != nil {
			return err
		}
		fmt.Println("ready", l.Addr())
		return Server{Self: self, Token: "secret", Log: log}.Serve(ctx, l)
	case "client":
		remote, err := Connect(ctx, args[0], "secret")
		if err != nil {
			return err
		}
		defer remote.Close()
		r, err := Run(ctx, Options{
			Underlays: []string{Existing}, Datapaths: args[1:], Workloads: []string{"tcp1", "udp64", "rr"},
			Nodes: 2, Rounds: 1, Duration: 100 * time.Millisecond, Generator: "builtin", Self: self, Remote: remote,
		})
		if err != nil {
			return err
		}
		text, err := r.JSON()
		if err == nil {
			_, err = os.Stdout.Write(text)
		}
		return err
	case "victim":
		_, err := Run(ctx, Options{
			Underlays: []string{"offload"}, Datapaths: []string{"vxlan/userspace", "vxlan/kernel"}, Workloads: []string{"tcp1"},
			Nodes: 2, Rounds: 100, Duration: time.Second, Generator: "builtin", Self: self,
			Progress: func(p Progress) {
				if p.Done > 0 {
					fmt.Println("measuring")
				}
			},
		})
		return err
	}
	return fmt.Errorf("unknown part %q", part)
}
