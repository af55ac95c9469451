package cni

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"culvert/internal/api/readiness"
)

// errUnavailable is the code of a STATUS error: the plugin cannot serve ADD
// (SPEC.md 1.1.0, Error codes).
const errUnavailable = 50

// Time limits of STATUS. containerd calls it every 5 seconds and blocks
// meanwhile; a late answer on a host that is busy starting pods would make the
// node NotReady.
const (
	statusTimeout = 900 * time.Millisecond
	daemonTimeout = 600 * time.Millisecond
)

// Status reports whether an ADD would succeed: the daemon is ready, the lease is
// valid, the bridge is usable and the delegate's STATUS succeeds.
func (p Plugin) Status(args *skel.CmdArgs) error {
	ctx, cancel := context.WithTimeout(context.Background(), statusTimeout)
	defer cancel()
	n, err := ParseNetConf(args.StdinData, p.defaults)
	if err != nil {
		return err
	}
	env, err := n.ready(ctx)
	if err != nil {
		return unavailable(err)
	}
	conf, err := n.Delegate(env)
	if err != nil {
		return err
	}
	answer := make(chan error, 1)
	go func() { answer <- delegate(ctx, "STATUS", Attachment{}, conf, "") }()
	select {
	case err = <-answer:
	case <-ctx.Done():
		// The delegate was killed, but a child of it may keep its output open.
		err = ctx.Err()
	}
	if ctx.Err() != nil {
		kind, _ := n.delegateType()
		return unavailable(fmt.Errorf("delegate %s: STATUS timed out", kind))
	}
	if err != nil && !unsupportedVerb(err) {
		return unavailable(err)
	}
	return nil
}

// unavailable converts err to an error with code 50.
func unavailable(err error) error {
	var e *types.Error
	if errors.As(err, &e) {
		return types.NewError(errUnavailable, e.Msg, e.Details)
	}
	return types.NewError(errUnavailable, err.Error(), "")
}

// runDir returns the daemon's run directory: as configured, else the directory of
// subnet.env.
func (n NetConf) runDir() string {
	if n.RunDir != "" {
		return n.RunDir
	}
	return filepath.Dir(n.SubnetFile)
}

// ready returns the subnet in which an ADD would take place, or why it would fail.
// It waits for the daemon at most daemonTimeout.
//
// A missing daemon is an error, although an ADD would succeed until the lease
// expires: without it the lease is not renewed, changes of peers are not applied,
// and in the userspace datapath the new pod's packets are not forwarded. The
// exception is a subnet.env without an expiry, written by flanneld, which has no
// socket.
func (n NetConf) ready(ctx context.Context) (SubnetEnv, error) {
	askCtx, cancel := context.WithTimeout(ctx, daemonTimeout)
	defer cancel()
	answer, askErr := readiness.Ask(askCtx, n.runDir())
	if askErr == nil && !answer.Ready {
		return SubnetEnv{}, errors.New(answer.Reason)
	}
	env, err := n.currentSubnet(ctx)
	if err != nil {
		return SubnetEnv{}, err
	}
	if askErr != nil && (!env.Expires.IsZero() || !errors.Is(askErr, readiness.ErrNoDaemon)) {
		return SubnetEnv{}, fmt.Errorf("%w: see `systemctl status culvert` and `culvert status`", askErr)
	}
	b, err := n.findUnusableBridge(env)
	if err != nil {
		return SubnetEnv{}, err
	}
	if b != nil && !b.repairable() {
		return SubnetEnv{}, b.err()
	}
	return env, nil
}
