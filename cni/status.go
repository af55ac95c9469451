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

// errUnavailable is the specification's code for a STATUS that says that an ADD
// would fail (SPEC.md 1.1.0, Error codes).
const errUnavailable = 50

// How long STATUS takes at most. containerd asks every 5 seconds, and holds
// everything else up meanwhile; an answer that is late on a host that is busy
// starting pods would make the node NotReady.
const (
	statusPatience = 900 * time.Millisecond
	daemonPatience = 600 * time.Millisecond
)

// Status says whether an ADD would succeed: whether the daemon says so, the
// lease is ours, the bridge has its address, and the delegate has no objection.
func (p Plugin) Status(args *skel.CmdArgs) error {
	ctx, cancel := context.WithTimeout(context.Background(), statusPatience)
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
		// Killed, but a program of its own may keep its output open.
		err = ctx.Err()
	}
	if ctx.Err() != nil {
		kind, _ := n.delegateType()
		return unavailable(fmt.Errorf("delegate %s: STATUS is not answered", kind))
	}
	if err != nil && !predates(err) {
		return unavailable(err)
	}
	return nil
}

// unavailable is err as the specification's code 50: no ADD can succeed.
func unavailable(err error) error {
	var e *types.Error
	if errors.As(err, &e) {
		return types.NewError(errUnavailable, e.Msg, e.Details)
	}
	return types.NewError(errUnavailable, err.Error(), "")
}

// runDir is the daemon's run directory: told, or the one of subnet.env, which
// is where the daemon writes it.
func (n NetConf) runDir() string {
	if n.RunDir != "" {
		return n.RunDir
	}
	return filepath.Dir(n.SubnetFile)
}

// ready returns the subnet in which an ADD would take place, or why it could
// not. It does not wait for the daemon longer than daemonPatience.
//
// A daemon that is gone is a reason, although an ADD would succeed for as long
// as the lease lasts: nobody renews it, nobody follows the other nodes, and in
// the userspace datapath nobody carries the new pod's packets. The exception is
// a file without the lease's end, which flannel writes: flanneld has no socket.
func (n NetConf) ready(ctx context.Context) (SubnetEnv, error) {
	asking, cancel := context.WithTimeout(ctx, daemonPatience)
	defer cancel()
	said, asked := readiness.Ask(asking, n.runDir())
	if asked == nil && !said.Ready {
		return SubnetEnv{}, errors.New(said.Reason)
	}
	env, err := n.currentSubnet(ctx)
	if err != nil {
		return SubnetEnv{}, err
	}
	if asked != nil && (!env.Expires.IsZero() || !errors.Is(asked, readiness.ErrNoDaemon)) {
		return SubnetEnv{}, fmt.Errorf("%w: see `systemctl status culvert` and `culvert status`", asked)
	}
	b, err := n.findWornBridge(env)
	if err != nil {
		return SubnetEnv{}, err
	}
	if b != nil && !b.repairable() {
		return SubnetEnv{}, b.err()
	}
	return env, nil
}
