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

// Plugin implements the verbs of the CNI specification. As the specification
// requires, it reads its arguments from the environment and standard input, and
// writes its result to standard output.
type Plugin struct {
	defaults Defaults
}

// NewPlugin returns the plugin with the defaults for the program name argv0
// (DefaultsFor).
func NewPlugin(argv0 string) Plugin {
	return Plugin{defaults: DefaultsFor(argv0)}
}

// Funcs returns the verbs for skel.PluginMainFuncs.
func (p Plugin) Funcs() skel.CNIFuncs {
	return skel.CNIFuncs{Add: p.Add, Del: p.Del, Check: p.Check, GC: p.GC, Status: p.Status}
}

// Add attaches a container. It saves a record before it calls the delegate. If the
// delegate fails, Add calls its DEL, and removes the record only if that succeeds.
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
		return err // before there is anything to roll back
	}
	s := state{n.DataDir}
	// Inherited by the delegates and held until they exit, so that GC waits.
	if _, err := s.take(unix.LOCK_SH, lockTimeout); err != nil {
		if errors.Is(err, errLocked) {
			return types.NewError(types.ErrTryAgainLater, "a GC is in progress: "+err.Error(), "")
		}
		return err
	}
	s.removeOldUnfinished()
	if _, err := s.takeAttachment(a, lockTimeout); err != nil {
		if errors.Is(err, errLocked) {
			return types.NewError(types.ErrTryAgainLater, "another ADD of this container, or its removal, is in progress: "+err.Error(), "")
		}
		return err
	}
	if b, err := n.findUnusableBridge(env); err != nil {
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
	done, err := n.refuseRouters(args.Netns)
	if err != nil {
		fmt.Fprintf(os.Stderr, "culvert-cni: %v\n", err)
	}
	defer done()
	ctx := context.Background()
	result, undone, err := s.attach(ctx, kind, r)
	if err != nil && undone && noAddressLeft(err) {
		sum, cause := n.reclaim(ctx, s)
		if cause != nil {
			fmt.Fprintf(os.Stderr, "culvert-cni: releasing unused addresses: %v\n", cause)
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
	if err := addClsact(result); err != nil { // the pod's packets all pass the host then
		fmt.Fprintf(os.Stderr, "culvert-cni: %v\n", err)
	}
	return types.PrintResult(result, n.CNIVersion)
}

// attach saves r and calls the delegate's ADD. If that fails it calls the
// delegate's DEL; undone reports that this succeeded and the record was removed.
func (s state) attach(ctx context.Context, kind string, r record) (result types.Result, undone bool, err error) {
	if err := s.save(r); err != nil {
		return nil, false, err
	}
	result, err = invoke.DelegateAdd(ctx, kind, r.Delegate, nil)
	if err == nil {
		return result, false, nil
	}
	if undo := delegate(ctx, "DEL", r.Attachment, r.Delegate, r.NetnsPath); undo != nil {
		// Keep the record, so that the runtime's DEL can finish this.
		fmt.Fprintf(os.Stderr, "culvert-cni: rolling back the failed ADD of %s: %v\n", r.ContainerID, undo)
	} else if ferr := s.forget(r.Attachment); ferr != nil {
		fmt.Fprintf(os.Stderr, "culvert-cni: removing the record of the failed ADD of %s: %v\n", r.ContainerID, ferr)
	} else {
		undone = true
	}
	return nil, undone, wrapped(fmt.Sprintf("delegate %s: ADD", kind), err)
}

// checkNamespace rejects an ADD to something that is not a network namespace, or to
// the host's own.
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

// currentSubnet reads this node's subnet, and fails if its lease has expired. If
// the clocks disagree it asks the daemon, which holds the lease and corrects the
// expiry in the file within seconds of a clock step.
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
		askCtx, cancel := context.WithTimeout(ctx, daemonTimeout)
		defer cancel()
		answer, askErr := readiness.Ask(askCtx, n.runDir())
		expired = askErr != nil || answer.Code == readiness.Fenced || answer.Code == readiness.NoLease
	}
	if expired {
		return SubnetEnv{}, types.NewError(types.ErrTryAgainLater,
			fmt.Sprintf("%s: the lease of %v expired at %s: another node may have the subnet", n.SubnetFile, env.Subnets(), env.Expires.Format(time.RFC3339)),
			"the node daemon renews it or leases another subnet: check with `culvert status` that it runs and reaches the store")
	}
	return env, nil
}

// noAddressLeft reports whether host-local failed because all addresses are taken.
func noAddressLeft(err error) bool {
	var e *types.Error
	return errors.As(err, &e) && strings.Contains(e.Msg, "no IP addresses available in range set")
}

// exhausted returns the error for a full subnet, in place of host-local's, which
// speaks of a "range set".
func exhausted(env SubnetEnv, sum reclaimed) error {
	return types.NewError(types.ErrTryAgainLater,
		fmt.Sprintf("the node's subnet %v is exhausted: every address is in use", env.Subnets()), sum.String())
}

// clear prepares the state for an ADD of r. It rejects a second ADD of the same
// container, interface and namespace, as the specification requires: rolling back
// a failed second ADD would remove the first one's interface. If the record is of
// another namespace or boot (a reboot without DEL), it deletes that attachment.
func (s state) clear(r record) error {
	old, err := s.load(r.Attachment)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, errDamaged):
		// Left by an earlier crash: a runtime deletes a container before it adds it
		// again. Assume that the old delegate configuration equals the new one.
		old = record{Attachment: r.Attachment, Delegate: r.Delegate}
	case err != nil:
		return err
	case old.Netns == r.Netns && old.Boot == r.Boot:
		return types.NewError(types.ErrInternal,
			fmt.Sprintf("container %s already had an ADD of %s", r.ContainerID, r.IfName), "call DEL before another ADD")
	}
	if err := delegate(context.Background(), "DEL", old.Attachment, old.Delegate, ""); err != nil {
		return wrapped("deleting the attachment of an earlier ADD of this container", err)
	}
	return s.forget(r.Attachment)
}

// Del detaches a container. A missing record or namespace is not an error. If the
// delegate fails, the record is kept, so that the next DEL retries.
func (p Plugin) Del(args *skel.CmdArgs) error {
	n, a, err := p.parse(args)
	if err != nil {
		return err
	}
	s := state{n.DataDir}
	r, err := s.load(a)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return s.forget(a) // removes a temporary file left by a crash
	case errors.Is(err, errDamaged):
		// Assume that ADD would delegate the same configuration now.
		env, enverr := ReadSubnetEnv(n.SubnetFile)
		if enverr != nil {
			return wrapped("deleting without a record", errors.Join(err, enverr))
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

// Check calls the delegate's CHECK, and verifies that the addresses are in this
// node's subnets.
func (p Plugin) Check(args *skel.CmdArgs) error {
	n, a, err := p.parse(args)
	if err != nil {
		return err
	}
	r, err := state{n.DataDir}.load(a)
	if errors.Is(err, fs.ErrNotExist) {
		return types.NewError(types.ErrUnknownContainer,
			fmt.Sprintf("container %s has no record of an ADD of %s in %s", a.ContainerID, a.IfName, n.DataDir), "")
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

// checkAddresses returns an error if an address of prevResult is not in this node's
// subnets. It applies only to host-local.
func (n NetConf) checkAddresses(env SubnetEnv) error {
	if kind, err := n.ipamType(); err != nil || kind != "host-local" {
		return err
	}
	if len(n.PrevResult) == 0 {
		return invalid("prevResult is missing")
	}
	// All versions with CHECK (0.4.0 to 1.1.0) have ips with address.
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
				fmt.Sprintf("the pod's address %s is no longer in this node's subnet %v", ip.Address.Addr(), env.Subnets()),
				"delete the pod, so that it is recreated in the current subnet")
		}
	}
	return nil
}

// parse parses the arguments of a verb that concerns one container.
func (p Plugin) parse(args *skel.CmdArgs) (NetConf, Attachment, error) {
	a := Attachment{ContainerID: args.ContainerID, IfName: args.IfName}
	if err := a.validate(); err != nil {
		return NetConf{}, a, err
	}
	n, err := ParseNetConf(args.StdinData, p.defaults)
	return n, a, err
}

// delegate runs the plugin that conf names and ignores its result. For DEL it omits
// a namespace that does not exist: bridge's DEL fails on a file that is no longer
// mounted, but releases the address if CNI_NETNS is empty.
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

// findPlugin returns the path of a delegate.
func findPlugin(kind string) (string, error) {
	path, err := invoke.FindInPath(kind, pluginDirs())
	if err != nil {
		return "", types.NewError(types.ErrInternal, fmt.Sprintf("delegate %q: %v", kind, err), "")
	}
	return path, nil
}

// wrapped prefixes an error's message with what was attempted, keeping its code.
func wrapped(doing string, err error) error {
	var e *types.Error
	if errors.As(err, &e) {
		return types.NewError(e.Code, doing+": "+e.Msg, e.Details)
	}
	return types.NewError(types.ErrInternal, doing+": "+err.Error(), "")
}

// noSubnet returns the CNI error for an unreadable subnet.env. If the file is
// missing, the code makes the runtime retry.
func noSubnet(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return types.NewError(types.ErrTryAgainLater, err.Error(), "")
	}
	return types.NewError(types.ErrInvalidNetworkConfig, err.Error(), "the node daemon writes this file: see `culvert status`")
}
