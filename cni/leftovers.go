package cni

import (
	"bytes"
	"context"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/vishvananda/netlink"
)

// Leftovers of plugins chained after this one for containers that they or the
// runtime forgot: portmap's rules and bandwidth's queueing device. Neither plugin
// has a GC, up to version 1.9.

// ownerRules are one container's rules of one portmap backend.
type ownerRules struct {
	backend   string // as portmap names it: iptables or nftables
	container string
}

// leakedRules returns the port-mapping rules of this network whose container is gone
// (gone, or released by this GC). Rules that may belong to another network are left
// alone.
func (n NetConf) leakedRules(ctx context.Context, subnets []netip.Prefix, released map[string]bool, gone func(container string) bool) []ownerRules {
	var leaked []ownerRules
	note := func(r ownerRules) {
		if !slices.Contains(leaked, r) {
			leaked = append(leaked, r)
		}
	}
	for _, program := range []string{"iptables", "ip6tables"} {
		text := list(ctx, program, "-w", "5", "-t", "nat", "-S")
		for _, id := range iptablesOwners(text, n.Name) {
			if gone(id) {
				note(ownerRules{"iptables", id})
			}
		}
		// An interrupted ADD may have left a chain that no rule references.
		for id := range released {
			if bytes.Contains(text, []byte("-N "+hashed(28, "CNI-DN-", n.Name+id)+"\n")) {
				note(ownerRules{"iptables", id})
			}
		}
	}
	for _, family := range []string{"ip", "ip6"} {
		for id, ours := range nftablesOwners(list(ctx, "nft", "-j", "list", "table", family, "cni_hostport"), subnets) {
			if released[id] || ours && gone(id) {
				note(ownerRules{"nftables", id})
			}
		}
	}
	return leaked
}

// list runs a program that lists rules. If it fails, because the program or the
// table does not exist, there are no rules.
func list(ctx context.Context, program string, args ...string) []byte {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, args...).Output()
	if err != nil {
		return nil
	}
	return out
}

// iptablesOwners parses `iptables -S`: portmap's comments contain the network and the
// container. Truncated comments are ignored.
func iptablesOwners(text []byte, network string) []string {
	name := regexp.MustCompile(`-A CNI-HOSTPORT-DNAT .*--comment "dnat name: \\"` + regexp.QuoteMeta(network) + `\\" id: \\"([A-Za-z0-9_.-]+)\\""`)
	var ids []string
	for _, m := range name.FindAllSubmatch(text, -1) {
		if id := string(m[1]); !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids
}

// nftablesOwners parses `nft -j list table`. It returns the containers in portmap's
// comments, and whether one of their rules has an address in the subnets, since the
// comments do not contain the network.
func nftablesOwners(text []byte, subnets []netip.Prefix) map[string]bool {
	var table struct {
		Nftables []struct {
			Rule *struct {
				Comment string          `json:"comment"`
				Expr    json.RawMessage `json:"expr"`
			} `json:"rule"`
		} `json:"nftables"`
	}
	if json.Unmarshal(text, &table) != nil {
		return nil
	}
	owners := map[string]bool{}
	for _, o := range table.Nftables {
		if o.Rule == nil || o.Rule.Comment == "" {
			continue
		}
		ours := owners[o.Rule.Comment]
		for _, word := range strings.FieldsFunc(string(o.Rule.Expr), func(r rune) bool { return strings.ContainsRune(`"{}[], `, r) }) {
			if a, err := netip.ParseAddr(word); err == nil {
				ours = ours || slices.ContainsFunc(subnets, func(s netip.Prefix) bool { return s.Contains(a) })
			}
		}
		owners[o.Rule.Comment] = ours
	}
	return owners
}

// removeRules calls portmap's DEL for the container.
func (n NetConf) removeRules(ctx context.Context, r ownerRules) error {
	path, err := invoke.FindInPath("portmap", pluginDirs())
	if err != nil {
		return fmt.Errorf("container %s left port-mapping rules, and portmap, which removes them, is missing: %w", r.container, err)
	}
	conf, err := json.Marshal(map[string]any{
		"cniVersion": n.CNIVersion, "name": n.Name, "type": "portmap", "backend": r.backend,
		// portmap's DEL does nothing without mappings; any mapping will do.
		"runtimeConfig": map[string]any{"portMappings": []any{map[string]any{"hostPort": 1, "containerPort": 1, "protocol": "tcp"}}},
	})
	if err != nil {
		return err
	}
	env := delegateEnv{verb: "DEL", attachment: Attachment{ContainerID: r.container, IfName: "eth0"}}
	if err := invoke.ExecPluginWithoutResult(ctx, path, conf, env, nil); err != nil {
		return fmt.Errorf("removing the port-mapping rules of container %s: %w", r.container, err)
	}
	return nil
}

// removeQueue removes the ifb device with which bandwidth limits a container's
// ingress traffic.
func (n NetConf) removeQueue(container string) error {
	link, err := netlink.LinkByName(hashed(15, "bwp", n.Name+container))
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err == nil && link.Type() == "ifb" {
		err = netlink.LinkDel(link)
	}
	if err != nil {
		return fmt.Errorf("removing the bandwidth device of container %s: %w", container, err)
	}
	return nil
}

// hashed builds a name of the given length as the plugins do
// (pkg/utils.MustFormatHashWithPrefix in containernetworking/plugins).
func hashed(length int, prefix, of string) string {
	return fmt.Sprintf("%s%x", prefix, sha512.Sum512([]byte(of)))[:length]
}
