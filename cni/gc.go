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

// lockPatience is how long GC waits for ADDs on their way, and for host-local.
const lockPatience = 10 * time.Second

// validity is what the runtime says of attachments.
type validity struct {
	attachments map[Attachment]bool
	containers  map[string]bool // that have any
	// certain says that an attachment which is not listed is gone. A list that is
	// missing or empty does not say so: more runtimes have lost their state
	// than have garbage on a node without a single pod.
	certain bool
}

// validity reads the runtime's list. Its entries must name a container; one
// without an interface stands for all of the container's.
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

// has says whether a is to be kept.
func (v validity) has(a Attachment) bool {
	if !v.certain {
		return true
	}
	return v.attachments[a] || v.attachments[Attachment{ContainerID: a.ContainerID}] || a.IfName == "" && v.containers[a.ContainerID]
}

// GC releases what no valid attachment owns: what this plugin delegated,
// host-local's reservations, and the rules and devices that chained plugins
// left. Delegates have nothing of the sort (containernetworking/plugins up to
// 1.9: GC does nothing), but are asked, too.
//
// Where it cannot be known that something is garbage it stays: attachments
// that are younger than the call, files that are not understood, everything if
// the list is empty. Then, too, what ran before the machine was started last is
// garbage.
func (p Plugin) GC(args *skel.CmdArgs) error {
	// A file's time is the kernel's tick before its making: allow for that.
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
		fmt.Fprintln(os.Stderr, "culvert-cni: GC: without valid attachments nothing is released but what an earlier boot left; \"gcEmptyMeansAll\": true releases everything")
	}
	s := state{n.DataDir}
	alone, err := s.take(unix.LOCK_EX, lockPatience)
	if errors.Is(err, errLocked) {
		return types.NewError(types.ErrTryAgainLater, "an ADD is still on its way: "+err.Error(), "")
	}
	if err != nil {
		return err
	}
	records, err := s.records(n.Name, since)
	alone.release()
	if err != nil {
		return err
	}

	ctx := context.Background()
	var failed []error
	released, kept := map[string]bool{}, map[Attachment]bool{}
	boot := bootID()
	for _, r := range records {
		outlived := r.Boot != "" && boot != "" && r.Boot != boot
		if valid.has(r.Attachment) && (valid.certain || !outlived) {
			continue
		}
		err := delegate(ctx, "DEL", r.Attachment, r.Delegate, r.netns())
		if err == nil {
			err = s.forget(r.Attachment)
		}
		if err != nil {
			kept[r.Attachment] = true
			failed = append(failed, fmt.Errorf("container %s, interface %s: %w", r.ContainerID, r.IfName, err))
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
			fmt.Fprintf(os.Stderr, "culvert-cni: GC: released address %s of container %q: an earlier boot left it\n", r.Addr, r.Owner.ContainerID)
		}
	} else if ok {
		// A reservation without an owner is one that host-local was killed in.
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
		failed = append(failed, n.passOnGC(ctx, env))
	}
	if err := errors.Join(failed...); err != nil {
		return types.NewError(types.ErrInternal, "GC could not release everything", err.Error())
	}
	return nil
}

// collectLeftovers removes what chained plugins left for containers that are
// gone.
func (n NetConf) collectLeftovers(ctx context.Context, subnets []netip.Prefix, released map[string]bool, valid validity) (failed []error) {
	for id := range released {
		if valid.certain && valid.containers[id] {
			delete(released, id) // it lost one interface, and has others
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

// passOnGC hands the list to the delegate, which may be one that does something
// with it.
func (n NetConf) passOnGC(ctx context.Context, env SubnetEnv) error {
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
	if predates(err) {
		return nil
	}
	return err
}

// predates says whether a plugin refused a verb that its version of the
// specification does not have.
func predates(err error) bool {
	var e *types.Error
	return errors.As(err, &e) && (e.Code == types.ErrInvalidEnvironmentVariables || e.Code == types.ErrIncompatibleCNIVersion)
}
