package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"
)

// lockTimeout is how long to wait for a lock: GC for ADDs in progress, ADD for a GC,
// both for host-local.
const lockTimeout = 10 * time.Second

// validity is the runtime's list of valid attachments.
type validity struct {
	attachments map[Attachment]bool
	containers  map[string]bool // that have any
	// certain means that an attachment which is not listed is gone. A missing or
	// empty list does not mean that: a runtime that lost its state is more likely
	// than garbage on a node without a single pod.
	certain bool
}

// validity parses the runtime's list. An entry must name a container; one without
// an interface covers all of the container's.
func (n NetConf) validity() (validity, error) {
	v := validity{attachments: map[Attachment]bool{}, containers: map[string]bool{}}
	raw := n.ValidAttachments
	if len(raw) == 0 {
		raw = n.Attachments
	}
	if len(raw) == 0 || bytes.Equal(raw, []byte("null")) {
		return v, nil
	}
	var list []Attachment
	if err := json.Unmarshal(raw, &list); err != nil {
		return v, types.NewError(types.ErrDecodingFailure, "reading cni.dev/valid-attachments", err.Error())
	}
	for _, a := range list {
		if a.ContainerID == "" {
			return v, types.NewError(types.ErrInvalidNetworkConfig, "cni.dev/valid-attachments has an entry without a containerID", "nothing was released")
		}
		v.attachments[a], v.containers[a.ContainerID] = true, true
	}
	v.certain = len(list) > 0 || n.GCEmptyMeansAll
	return v, nil
}

// has reports whether a must be kept.
func (v validity) has(a Attachment) bool {
	if !v.certain {
		return true
	}
	return v.attachments[a] || v.attachments[Attachment{ContainerID: a.ContainerID}] || a.IfName == "" && v.containers[a.ContainerID]
}

// GC releases what no valid attachment owns: attachments of this plugin,
// host-local's reservations, and rules and devices left by chained plugins. The
// delegate's GC is called too, although those of containernetworking/plugins do
// nothing (up to 1.9).
//
// It keeps what may not be garbage: attachments newer than the call, files that it
// cannot parse, and everything of this boot if the list is empty. What an earlier
// boot left is always garbage.
func (p Plugin) GC(args *skel.CmdArgs) error {
	// A file's timestamp may be one kernel tick in the past: allow for that.
	since := time.Now().Add(-20 * time.Millisecond)
	n, err := ParseNetConf(args.StdinData, p.defaults)
	if err != nil {
		return err
	}
	valid, err := n.validity()
	if err != nil {
		return err
	}
	if !valid.certain {
		fmt.Fprintln(os.Stderr, "culvert-cni: GC: the list of valid attachments is empty, so only what an earlier boot left is released; \"gcEmptyMeansAll\": true releases everything")
	}
	s := state{n.DataDir}
	alone, err := s.take(unix.LOCK_EX, lockTimeout)
	if errors.Is(err, errLocked) {
		return types.NewError(types.ErrTryAgainLater, "an ADD is still in progress: "+err.Error(), "")
	}
	if err != nil {
		return err
	}
	s.removeUnfinished()
	records, err := s.records(n.Name, since)
	alone.release()
	if err != nil {
		return err
	}

	ctx := context.Background()
	var failed []error
	released, kept := map[string]bool{}, map[Attachment]bool{}
	boot := bootID()
	gone := func(r record) bool {
		outlived := r.Boot != "" && boot != "" && r.Boot != boot
		return !valid.has(r.Attachment) || !valid.certain && outlived
	}
	for _, r := range records {
		if !gone(r) {
			continue
		}
		// An ADD may have begun since the list was made: of a container that is not in
		// it, or, after a reboot, of one whose old record is.
		isNew := func(now record) bool { return now.Boot != r.Boot || now.Netns != r.Netns }
		ok, err := s.releaseIf(ctx, r.Attachment, func(now record) bool { return gone(now) && !isNew(now) })
		if err != nil {
			kept[r.Attachment] = true
			failed = append(failed, fmt.Errorf("container %s, interface %s: %w", r.ContainerID, r.IfName, err))
			continue
		}
		if !ok {
			kept[r.Attachment] = true
			continue
		}
		released[r.ContainerID] = true
		fmt.Fprintf(os.Stderr, "culvert-cni: GC: released container %s, interface %s\n", r.ContainerID, r.IfName)
	}

	if store, ok, err := n.addressStore(); err != nil {
		return err
	} else if ok && !valid.certain {
		var gone []reservation
		here, err := s.containers()
		if err == nil {
			gone, err = store.releaseEarlierBoot(here, nil)
		}
		if err != nil {
			failed = append(failed, err)
		}
		for _, r := range gone {
			fmt.Fprintf(os.Stderr, "culvert-cni: GC: released address %s of container %q, left by an earlier boot\n", r.Addr, r.Owner.ContainerID)
		}
	} else if ok {
		// A reservation without an owner was left when host-local was killed.
		gone, err := store.release(since, func(r reservation) bool {
			return !valid.has(r.Owner) && !kept[r.Owner]
		})
		if err != nil {
			failed = append(failed, err)
		}
		for _, r := range gone {
			if r.Owner.ContainerID != "" {
				released[r.Owner.ContainerID] = true
			}
			fmt.Fprintf(os.Stderr, "culvert-cni: GC: released address %s of container %q\n", r.Addr, r.Owner.ContainerID)
		}
	}

	env, enverr := ReadSubnetEnv(n.SubnetFile)
	failed = append(failed, n.collectLeftovers(ctx, env.Subnets(), released, valid)...)
	if enverr == nil && valid.certain {
		failed = append(failed, n.delegateGC(ctx, env))
	}
	if err := errors.Join(failed...); err != nil {
		return types.NewError(types.ErrInternal, "GC could not release everything", err.Error())
	}
	return nil
}

// collectLeftovers removes what chained plugins left for containers that are gone.
func (n NetConf) collectLeftovers(ctx context.Context, subnets []netip.Prefix, released map[string]bool, valid validity) (failed []error) {
	for id := range released {
		if valid.certain && valid.containers[id] {
			delete(released, id) // only one of its interfaces was released
			continue
		}
		if err := n.removeQueue(id); err != nil {
			failed = append(failed, err)
		}
	}
	gone := func(id string) bool { return released[id] || valid.certain && !valid.containers[id] }
	for _, r := range n.leakedRules(ctx, subnets, released, gone) {
		if err := n.removeRules(ctx, r); err != nil {
			failed = append(failed, err)
			continue
		}
		fmt.Fprintf(os.Stderr, "culvert-cni: GC: removed the %s port mappings of container %s\n", r.backend, r.container)
	}
	return failed
}

// delegateGC passes the list on to the delegate's GC.
func (n NetConf) delegateGC(ctx context.Context, env SubnetEnv) error {
	conf, err := n.Delegate(env)
	if err != nil {
		return err
	}
	conf, err = with(conf, map[string]json.RawMessage{
		"cni.dev/valid-attachments": n.ValidAttachments, "cni.dev/attachments": n.Attachments,
	})
	if err != nil {
		return err
	}
	err = delegate(ctx, "GC", Attachment{}, conf, "")
	if unsupportedVerb(err) {
		return nil
	}
	return err
}

// unsupportedVerb reports whether a plugin rejected a verb because its version of the
// specification does not have it.
func unsupportedVerb(err error) bool {
	var e *types.Error
	return errors.As(err, &e) && (e.Code == types.ErrInvalidEnvironmentVariables || e.Code == types.ErrIncompatibleCNIVersion)
}
