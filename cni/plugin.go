package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/ns"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"culvert/internal/api/readiness"
	"culvert/internal/boottime"
)

// Plugin answers the verbs of the CNI specification. It reads its arguments
// from the environment and standard input, as the runtime gives them, and its
// result goes to standard output.
type Plugin struct {
	defaults Defaults
}

// NewPlugin returns the plugin as it behaves under the name argv0
// (DefaultsFor).
func NewPlugin(argv0 string) Plugin {
	return Plugin{defaults: DefaultsFor(argv0)}
}

// Funcs returns the verbs for skel.PluginMainFuncs.
func (p Plugin) Funcs() skel.CNIFuncs {
	return skel.CNIFuncs{Add: p.Add, Del: p.Del, Check: p.Check, GC: p.GC, Status: p.Status}
}

// Add attaches a container: it saves what it is going to do, then has the
// delegate do it. A delegate that fails is told to undo, and the record goes
// only when it has.
func (p Plugin) Add(args *skel.CmdArgs) error {
	n, a, err := p.parse(args)
	if err != nil {
		return err
	}
	if err := checkNamespace(args); err != nil {
		return err
	}
	env, err := n.currentSubnet(context.Background())
	if err != nil {
		return err
	}
	conf, err := n.Delegate(env)
	if err != nil {
		return err
	}

	kind, err := n.delegateType()
	if err != nil {
		return err
	}
	if _, err := findPlugin(kind); err != nil {
		return err // before there is anything to undo
	}
	s := state{n.DataDir}
	// Held to the end of the process and of the delegates: GC waits for it.
	if _, err := s.take(unix.LOCK_SH, lockPatience); err != nil {
		if errors.Is(err, errLocked) {
			return types.NewError(types.ErrTryAgainLater, "a GC is on its way: "+err.Error(), "")
		}
		return err
	}
	if b, err := n.findWornBridge(env); err != nil {
		return err
	} else if b != nil {
		if err := b.repair(); err != nil {
			return err
		}
	}
	r := record{
		Attachment: a, Network: n.Name,
		Netns: netnsIdentity(args.Netns), Boot: bootID(), NetnsPath: args.Netns,
		Delegate: conf,
	}
	if err := s.clear(r); err != nil {
		return err
	}
	ctx := context.Background()
	result, undone, err := s.attach(ctx, kind, r)
	if err != nil && undone && noAddressLeft(err) {
		sum, cause := n.reclaim(ctx, s)
		if cause != nil {
			fmt.Fprintf(os.Stderr, "culvert-cni: releasing what is nobody's: %v\n", cause)
		}
		if sum.released > 0 {
			result, _, err = s.attach(ctx, kind, r)
		}
		if err != nil {
			err = exhausted(env, sum)
		}
	}
	if err != nil {
		return err
	}
	return types.PrintResult(result, n.CNIVersion)
}

// attach records r and has the delegate carry it out. If that fails the delegate
// is told to undo it, and undone says that it has.
func (s state) attach(ctx context.Context, kind string, r record) (result types.Result, undone bool, err error) {
	if err := s.save(r); err != nil {
		return nil, false, err
	}
	result, err = invoke.DelegateAdd(ctx, kind, r.Delegate, nil)
	if err == nil {
		return result, false, nil
	}
	if undo := delegate(ctx, "DEL", r.Attachment, r.Delegate, r.NetnsPath); undo != nil {
		// The record stays, for the runtime's own DEL to finish.
		fmt.Fprintf(os.Stderr, "culvert-cni: undoing the failed ADD of %s: %v\n", r.ContainerID, undo)
	} else if ferr := s.forget(r.Attachment); ferr != nil {
		fmt.Fprintf(os.Stderr, "culvert-cni: forgetting the failed ADD of %s: %v\n", r.ContainerID, ferr)
	} else {
		undone = true
	}
	return nil, undone, wrapped(fmt.Sprintf("delegate %s: ADD", kind), err)
}

// checkNamespace refuses an ADD into nothing, or into the node's own
// namespace, before anything is done.
func checkNamespace(args *skel.CmdArgs) error {
	if !isNamespace(args.Netns) {
		return types.NewError(types.ErrInvalidNetNS, fmt.Sprintf("%q is not a network namespace", args.Netns), "")
	}
	if o := strings.ToUpper(args.NetnsOverride); o == "TRUE" || o == "1" {
		return nil
	}
	own, err := ns.CheckNetNS(args.Netns)
	if err != nil {
		return err
	}
	if own {
		return types.NewError(types.ErrInvalidNetNS, "CNI_NETNS is the namespace that the plugin runs in", "")
	}
	return nil
}

// currentSubnet reads which subnet is this node's, and until when. Where the
// clocks disagree, the daemon decides: it holds the lease, and moves the file's
// end within seconds of a clock that is set.
func (n NetConf) currentSubnet(ctx context.Context) (SubnetEnv, error) {
	env, err := ReadSubnetEnv(n.SubnetFile)
	if err != nil {
		return SubnetEnv{}, noSubnet(err)
	}
	now, err := boottime.Now()
	if err != nil {
		return SubnetEnv{}, err
	}
	expired, disputed := env.Expired(now)
	if disputed {
		asking, cancel := context.WithTimeout(ctx, daemonPatience)
		defer cancel()
		said, asked := readiness.Ask(asking, n.runDir())
		expired = asked != nil || said.Code == readiness.Fenced || said.Code == readiness.NoLease
	}
	if expired {
		return SubnetEnv{}, types.NewError(types.ErrTryAgainLater,
			fmt.Sprintf("%s: the lease of %v ran out at %s: the subnet may be another node's", n.SubnetFile, env.Subnets(), env.Expires.Format(time.RFC3339)),
			"the node daemon renews it, or leases another one: is it running, and does it reach etcd? `culvert status`")
	}
	return env, nil
}

// noAddressLeft says whether host-local found every address taken.
func noAddressLeft(err error) bool {
	var e *types.Error
	return errors.As(err, &e) && strings.Contains(e.Msg, "no IP addresses available in range set")
}

// exhausted says plainly that there is no address left, which host-local says
// of a "range set".
func exhausted(env SubnetEnv, sum reclaimed) error {
	return types.NewError(types.ErrTryAgainLater,
		fmt.Sprintf("the node's subnet %v is exhausted: every address is a pod's", env.Subnets()), sum.String())
}

// clear makes way for an ADD of r. The same container, interface and namespace
// again is refused, as the specification has it: undoing a second ADD that
// fails would take down the first. A record of a namespace that is gone (the
// machine was rebooted, the runtime never said DEL) is deleted first.
func (s state) clear(r record) error {
	old, err := s.load(r.Attachment)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, errDamaged):
		// Of a crash long ago: a runtime that adds a container has deleted what it
		// knew of it. What is delegated now is the best guess at what was then.
		old = record{Attachment: r.Attachment, Delegate: r.Delegate}
	case err != nil:
		return err
	case old.Netns == r.Netns && old.Boot == r.Boot:
		return types.NewError(types.ErrInternal,
			fmt.Sprintf("container %s has had an ADD of %s already", r.ContainerID, r.IfName), "DEL it before another ADD")
	}
	if err := delegate(context.Background(), "DEL", old.Attachment, old.Delegate, ""); err != nil {
		return wrapped("deleting what an earlier ADD of this container left", err)
	}
	return s.forget(r.Attachment)
}

// Del detaches a container. Whatever is gone already is a success: the record,
// the namespace, everything. A delegate that fails keeps the record, so that
// the next DEL tries again.
func (p Plugin) Del(args *skel.CmdArgs) error {
	n, a, err := p.parse(args)
	if err != nil {
		return err
	}
	s := state{n.DataDir}
	r, err := s.load(a)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return s.forget(a) // what a crash in the middle of saving may have left
	case errors.Is(err, errDamaged):
		// What ADD would delegate now is the best guess at what it delegated.
		env, enverr := ReadSubnetEnv(n.SubnetFile)
		if enverr != nil {
			return wrapped("deleting without state", errors.Join(err, enverr))
		}
		if r.Delegate, err = n.Delegate(env); err != nil {
			return err
		}
	case err != nil:
		return err
	}
	conf, err := with(r.Delegate, map[string]json.RawMessage{"prevResult": n.PrevResult})
	if err != nil {
		return err
	}
	if err := delegate(context.Background(), "DEL", a, conf, args.Netns); err != nil {
		return err
	}
	return s.forget(a)
}

// Check asks the delegate whether the attachment is as its ADD left it, and
// subnet.env whether the addresses are still this node's.
func (p Plugin) Check(args *skel.CmdArgs) error {
	n, a, err := p.parse(args)
	if err != nil {
		return err
	}
	r, err := state{n.DataDir}.load(a)
	if errors.Is(err, fs.ErrNotExist) {
		return types.NewError(types.ErrUnknownContainer,
			fmt.Sprintf("container %s has no ADD of %s in %s", a.ContainerID, a.IfName, n.DataDir), "")
	}
	if err != nil {
		return err
	}
	env, err := ReadSubnetEnv(n.SubnetFile)
	if err != nil {
		return noSubnet(err)
	}
	if err := n.checkAddresses(env); err != nil {
		return err
	}
	conf, err := with(r.Delegate, map[string]json.RawMessage{"prevResult": n.PrevResult})
	if err != nil {
		return err
	}
	return delegate(context.Background(), "CHECK", a, conf, args.Netns)
}

// checkAddresses says which address of prevResult is not of this node's
// subnets. Only host-local takes its addresses from them.
func (n NetConf) checkAddresses(env SubnetEnv) error {
	if kind, err := n.ipamType(); err != nil || kind != "host-local" {
		return err
	}
	if len(n.PrevResult) == 0 {
		return invalid("prevResult is missing")
	}
	// 0.3.0 to 1.1.0 all have ips with address; older ones cannot CHECK.
	var prev struct {
		IPs []struct {
			Address netip.Prefix `json:"address"`
		} `json:"ips"`
	}
	if err := json.Unmarshal(n.PrevResult, &prev); err != nil {
		return types.NewError(types.ErrDecodingFailure, "reading prevResult", err.Error())
	}
	for _, ip := range prev.IPs {
		if !slices.ContainsFunc(env.Subnets(), func(s netip.Prefix) bool { return s.Contains(ip.Address.Addr()) }) {
			return types.NewError(types.ErrInternal,
				fmt.Sprintf("the pod's address %s is not in this node's subnet %v any more", ip.Address.Addr(), env.Subnets()),
				"delete the pod, so that it is made anew in the present subnet")
		}
	}
	return nil
}

// parse reads what the verbs that concern one container have in common.
func (p Plugin) parse(args *skel.CmdArgs) (NetConf, Attachment, error) {
	a := Attachment{ContainerID: args.ContainerID, IfName: args.IfName}
	if err := a.validate(); err != nil {
		return NetConf{}, a, err
	}
	n, err := ParseNetConf(args.StdinData, p.defaults)
	return n, a, err
}

// delegate runs the plugin that conf names, without a result. A namespace that
// is not there is not named to it: bridge's DEL fails on a file that lost its
// mount, and frees the address when it is told of none.
func delegate(ctx context.Context, verb string, a Attachment, conf []byte, netns string) error {
	var c struct {
		Type string `json:"type"`
	}
	if err := json.Unmarshal(conf, &c); err != nil {
		return types.NewError(types.ErrDecodingFailure, "reading the delegate's configuration", err.Error())
	}
	path, err := findPlugin(c.Type)
	if err != nil {
		return err
	}
	if verb == "DEL" && !isNamespace(netns) {
		netns = ""
	}
	err = invoke.ExecPluginWithoutResult(ctx, path, conf, delegateEnv{verb: verb, attachment: a, netns: netns}, nil)
	if err != nil {
		return wrapped(fmt.Sprintf("delegate %s: %s", c.Type, verb), err)
	}
	return nil
}

// findPlugin returns the path of a delegate's program.
func findPlugin(kind string) (string, error) {
	path, err := invoke.FindInPath(kind, pluginDirs())
	if err != nil {
		return "", types.NewError(types.ErrInternal, fmt.Sprintf("delegate %q: %v", kind, err), "")
	}
	return path, nil
}

// wrapped puts what was attempted before an error's message and keeps its code.
func wrapped(doing string, err error) error {
	var e *types.Error
	if errors.As(err, &e) {
		return types.NewError(e.Code, doing+": "+e.Msg, e.Details)
	}
	return types.NewError(types.ErrInternal, doing+": "+err.Error(), "")
}

// noSubnet is the refusal to add or check a pod while it is not known which
// subnet is this node's. The runtime tries again.
func noSubnet(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return types.NewError(types.ErrTryAgainLater, err.Error(), "")
	}
	return types.NewError(types.ErrInvalidNetworkConfig, err.Error(), "the node daemon writes this file; `culvert status` says how it is")
}
