package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/names"
)

// sysctl returns a kernel setting, or "" if the kernel lacks it; key is a path
// below /proc/sys.
func sysctl(key string) string {
	b, err := os.ReadFile("/proc/sys/" + key)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// writableProcSys is where the Kubernetes manifests mount the host's
// /proc/sys/net: in an unprivileged container /proc/sys is read-only.
const writableProcSys = "/host/proc/sys/"

// setSysctl writes a setting, through writableProcSys if /proc/sys is
// read-only.
func setSysctl(key, value string) error {
	err := os.WriteFile("/proc/sys/"+key, []byte(value), 0)
	if !errors.Is(err, unix.EROFS) && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	if os.WriteFile(writableProcSys+key, []byte(value), 0) == nil {
		return nil
	}
	return fmt.Errorf("%w: set it on the host, or mount the host's /proc/sys/net at %snet in the container (it is %s)", err, writableProcSys, sysctl(key))
}

// SetSysctl writes a kernel setting; key is a path below /proc/sys.
func SetSysctl(key, value string) error { return setSysctl(key, value) }

// Sysctl returns a kernel setting, or "" if the kernel lacks it.
func Sysctl(key string) string { return sysctl(key) }

func sysctlCommand(key, value string) string {
	// sysctl(8) swaps dots and slashes.
	return "sysctl -w " + strings.Map(func(r rune) rune {
		switch r {
		case '/':
			return '.'
		case '.':
			return '/'
		}
		return r
	}, key) + "=" + value
}

// forwardingKey is the forwarding switch of a family. For IPv4, changing it
// also sets the value of each link, which is what the kernel checks.
func forwardingKey(is4 bool) string {
	if is4 {
		return "net/ipv4/ip_forward"
	}
	return "net/ipv6/conf/all/forwarding"
}

// setting is a kernel setting that a device of ours needs.
type setting struct {
	key, value string
	// caution is set if packets pass without it.
	caution bool
}

// deviceSettings returns the settings of a device of ours, which are made
// before it goes up; have are the present ones.
//
// No link-local addresses and no router advertisements: nothing on a tunnel
// device uses them, so a sender would be malicious.
//
// forwarding: the kernel forwards an IPv4 packet if its input link forwards
// (ip_route_input_slow in net/ipv4/route.c); a new link inherits that from
// conf/default. rp_filter: with a strict check, a peer's packet through the
// tunnel is dropped while the route to that peer is direct. The kernel uses the
// maximum of the link's value and that of all, and 2 is loose. disable_ipv6:
// with it, a link accepts no IPv6 address.
func deviceSettings(l Link, have map[string]string) []setting {
	v4, v6 := "net/ipv4/conf/"+l.Name+"/", "net/ipv6/conf/"+l.Name+"/"
	all := []setting{{v6 + "addr_gen_mode", "1", true}, {v6 + "accept_ra", "0", true}} // addr_gen_mode 1: none
	var has4, has6 bool
	for _, p := range l.Addrs {
		has4, has6 = has4 || p.Addr().Is4(), has6 || p.Addr().Is6()
	}
	if has6 && have[v6+"disable_ipv6"] != "" {
		all = append(all, setting{v6 + "disable_ipv6", "0", false})
	}
	if has4 && have[v4+"forwarding"] != "" && have[forwardingKey(true)] != "0" { // otherwise the global switch sets it
		all = append(all, setting{v4 + "forwarding", "1", false})
	}
	if has4 && max(have["net/ipv4/conf/all/rp_filter"], have[v4+"rp_filter"]) == "1" {
		all = append(all, setting{v4 + "rp_filter", "2", false})
	}
	return all
}

// deviceKeys are the settings of a device that are read from /proc/sys; netconf
// provides the others.
func deviceKeys(link string) []string {
	v6 := "net/ipv6/conf/" + link + "/"
	return []string{v6 + "addr_gen_mode", v6 + "accept_ra", v6 + "disable_ipv6"}
}

// newDevice returns the settings that a new link would have.
func (r reading) newDevice(link string) map[string]string {
	made := map[string]string{}
	for key, value := range r.settings {
		if family, rest, ok := strings.Cut(key, "/conf/default/"); ok {
			made[family+"/conf/"+link+"/"+rest] = value
		}
		if strings.Contains(key, "/conf/all/") {
			made[key] = value
		}
	}
	if r.settings[forwardingKey(true)] == "0" {
		// Forwarding, and its default, is enabled before any device is created.
		made["net/ipv4/conf/"+link+"/forwarding"] = "1"
	}
	return made
}

// Attributes of a netconf message (linux/netconf.h, NETCONFA_...), and the
// indexes that are not links.
const (
	netconfIndex, netconfForwarding, netconfRPFilter = 1, 2, 3
	netconfAll, netconfDefault                       = -1, -2
)

// readSettings reads the relevant settings of our links and others; IPv4's with
// a single netconf dump.
func (r *reading) readSettings(linkNames map[int]string) error {
	r.note(forwardingKey(true))
	r.note(forwardingKey(false))
	for _, key := range deviceKeys("default") {
		r.note(key)
	}
	wanted := map[string]bool{"all": true, "default": true, r.view.Underlay.Name: true}
	for name := range r.devices {
		wanted[name] = true
		for _, key := range deviceKeys(name) {
			r.note(key)
		}
	}
	for _, b := range r.bearers {
		wanted[b.Name] = true
	}
	for _, name := range r.advertised(linkNames) {
		r.note(acceptKey(name))
	}
	c, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	messages, err := dump(c, netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETNETCONF},
		Data:   []byte{unix.AF_INET, 0, 0, 0}, // struct netconfmsg
	})
	if err != nil {
		return fmt.Errorf("reading the links' settings: %w", err)
	}
	for _, m := range messages {
		if len(m.Data) < 4 {
			continue
		}
		d, err := netlink.NewAttributeDecoder(m.Data[4:])
		if err != nil {
			return fmt.Errorf("reading the links' settings: %w", err)
		}
		name, values := "", map[string]string{}
		for d.Next() {
			if len(d.Bytes()) != 4 {
				continue
			}
			switch v := int(int32(binary.NativeEndian.Uint32(d.Bytes()))); d.Type() {
			case netconfIndex:
				switch v {
				case netconfAll:
					name = "all"
				case netconfDefault:
					name = "default"
				default:
					name = linkNames[v]
				}
			case netconfForwarding:
				values["forwarding"] = strconv.Itoa(v)
			case netconfRPFilter:
				values["rp_filter"] = strconv.Itoa(v)
			}
		}
		if d.Err() != nil || !wanted[name] || name == "" {
			continue
		}
		for k, v := range values {
			r.settings["net/ipv4/conf/"+name+"/"+k] = v
		}
	}
	return nil
}

// acceptKey is whether a link uses router advertisements: 1 only while this
// host does not forward, 2 always.
func acceptKey(link string) string { return "net/ipv6/conf/" + link + "/accept_ra" }

// advertised returns the links that may use router advertisements: the
// underlay, and those with routes from them.
func (r reading) advertised(linkNames map[int]string) []string {
	all := make([]string, 0, 1+len(r.advertisedBy))
	if r.view.Underlay.Name != "" {
		all = append(all, r.view.Underlay.Name)
	}
	for i := range r.advertisedBy {
		if name := linkNames[i]; name != "" && !names.Managed(name) && name != r.view.Underlay.Name {
			all = append(all, name)
		}
	}
	slices.Sort(all)
	return all
}

// forwarding enables forwarding. It is never disabled, because others may need
// it.
//
// For IPv6 the kernel then ignores router advertisements and drops the default
// routes from them, unless accept_ra is already 2.
func (d *differ) forwarding(have reading, want State) {
	for _, is4 := range []bool{true, false} {
		if !slices.ContainsFunc(want.Routes, func(r Route) bool { return r.To.Addr().Is4() == is4 }) {
			continue
		}
		on := have.settings[forwardingKey(is4)] == "1"
		if !is4 {
			for _, name := range have.advertisers {
				if have.settings[acceptKey(name)] == "1" && (!on || have.advertisedOn(name)) {
					d.before = append(d.before, have.setting(acceptKey(name), "2", "")...)
				}
			}
		}
		d.before = append(d.before, have.setting(forwardingKey(is4), "1", "")...)
		if !is4 || !on {
			continue // the global switch sets each link's
		}
		for _, name := range have.forwardingLinks(want) {
			d.before = append(d.before, have.setting("net/ipv4/conf/"+name+"/forwarding", "1", "")...)
		}
	}
}

// advertisedOn reports whether the link has routes from router advertisements.
func (r reading) advertisedOn(link string) bool { return r.advertisedBy[r.indexes[link]] }

// forwardingLinks returns the links, not culvert's own, on which packets to forward
// arrive: the underlay, and those that pods are attached to.
func (r reading) forwardingLinks(want State) []string {
	var all []string
	if name := r.view.Underlay.Name; name != "" {
		all = append(all, name)
	}
	for _, b := range r.bearers {
		inside := false
		for _, n := range want.Firewall.Forward {
			inside = inside || n.Contains(b.addr.Addr()) && b.addr.Addr().Is4()
		}
		if inside && !slices.Contains(all, b.Name) {
			all = append(all, b.Name)
		}
	}
	return all
}
