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
)

// sysctl returns a kernel setting; key is a path below /proc/sys. A setting that
// the kernel does not have is "".
func sysctl(key string) string {
	b, err := os.ReadFile("/proc/sys/" + key)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// writableProcSys is where the Kubernetes manifests mount the host's
// /proc/sys/net. In a container that is not privileged /proc/sys is read-only.
const writableProcSys = "/host/proc/sys/"

// setSysctl writes a setting.
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

// Sysctl returns a kernel setting; one that the kernel does not have is "".
func Sysctl(key string) string { return sysctl(key) }

func sysctlCommand(key, value string) string {
	// A dot within a name is a slash, and the other way round (sysctl(8)).
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

// forwardingKey is the switch for packet forwarding. In IPv4, writing another
// value to it sets each link's own, too, which is what counts.
func forwardingKey(is4 bool) string {
	if is4 {
		return "net/ipv4/ip_forward"
	}
	return "net/ipv6/conf/all/forwarding"
}

// setting is a kernel setting that a device of ours must have.
type setting struct {
	key, value string
	// caution says that packets pass without it, too.
	caution bool
}

// deviceSettings are what a device of ours is set to before it goes up; have are
// the settings as they are.
//
// Nobody on a tunnel device is found by link-local address, and nobody there
// has routes to advertise: who sends them means harm.
//
// An IPv4 packet is forwarded if the link that it comes in by forwards
// (ip_route_input_slow in net/ipv4/route.c): a new link takes that from
// conf/default. Where reverse paths are checked strictly, a peer's packet by the
// tunnel is lost while the route to that peer is a direct one; of the link's value
// and that for all the kernel takes the greater, and 2 is loose. A link without
// IPv6 takes no IPv6 address.
func deviceSettings(l Link, have map[string]string) []setting {
	v4, v6 := "net/ipv4/conf/"+l.Name+"/", "net/ipv6/conf/"+l.Name+"/"
	all := []setting{{v6 + "addr_gen_mode", "1", true}, {v6 + "accept_ra", "0", true}} // 1: none
	var has4, has6 bool
	for _, p := range l.Addrs {
		has4, has6 = has4 || p.Addr().Is4(), has6 || p.Addr().Is6()
	}
	if has6 && have[v6+"disable_ipv6"] != "" {
		all = append(all, setting{v6 + "disable_ipv6", "0", false})
	}
	if has4 && have[v4+"forwarding"] != "" && have[forwardingKey(true)] != "0" { // else it is turned on with all
		all = append(all, setting{v4 + "forwarding", "1", false})
	}
	if has4 && max(have["net/ipv4/conf/all/rp_filter"], have[v4+"rp_filter"]) == "1" {
		all = append(all, setting{v4 + "rp_filter", "2", false})
	}
	return all
}

// deviceKeys are the settings of a link of ours in one family that are looked
// at, less those that netconf has.
func deviceKeys(link string) []string {
	v6 := "net/ipv6/conf/" + link + "/"
	return []string{v6 + "addr_gen_mode", v6 + "accept_ra", v6 + "disable_ipv6"}
}

// newDevice are the settings that a link has when it is made.
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
		// It is turned on before any device is made, and with it the default.
		made["net/ipv4/conf/"+link+"/forwarding"] = "1"
	}
	return made
}

// What a netconf message says (linux/netconf.h, NETCONFA_...), and the indexes
// that are no link's.
const (
	netconfIndex, netconfForwarding, netconfRPFilter = 1, 2, 3
	netconfAll, netconfDefault                       = -1, -2
)

// readSettings reads the settings that matter of links by name, ours and others,
// of which those in IPv4 are one question to the kernel.
func (r *reading) readSettings(names map[int]string) error {
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
		wanted[b.name] = true
	}
	for _, name := range r.advertised(names) {
		r.note(acceptKey(name))
	}
	c, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	messages, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETNETCONF, Flags: netlink.Request | netlink.Dump},
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
					name = names[v]
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

// acceptKey says whether a link takes router advertisements: 1 is only while
// this host does not forward, 2 is always.
func acceptKey(link string) string { return "net/ipv6/conf/" + link + "/accept_ra" }

// advertised are the links that have, or may have, what router advertisements
// give: the underlay, and those with routes from there.
func (r reading) advertised(names map[int]string) []string {
	all := make([]string, 0, 1+len(r.advertisedBy))
	if r.view.Underlay.Name != "" {
		all = append(all, r.view.Underlay.Name)
	}
	for i := range r.advertisedBy {
		if name := names[i]; name != "" && !Ours(name) && name != r.view.Underlay.Name {
			all = append(all, name)
		}
	}
	slices.Sort(all)
	return all
}

// forwarding turns it on. It is never turned off: others may need it.
//
// In IPv6 the kernel then stops to take router advertisements, and forgets the
// default routes that it has from them, unless accept_ra is 2 by then.
func (d *differ) forwarding(have reading, want State) {
	for _, is4 := range []bool{true, false} {
		if !slices.ContainsFunc(want.Routes, func(r Route) bool { return r.To.Addr().Is4() == is4 }) {
			continue
		}
		on := have.settings[forwardingKey(is4)] == "1"
		if !is4 {
			for _, name := range have.advertisers {
				if have.settings[acceptKey(name)] == "1" && (!on || have.lives(name)) {
					d.before = append(d.before, have.setting(acceptKey(name), "2", "")...)
				}
			}
		}
		d.before = append(d.before, have.setting(forwardingKey(is4), "1", "")...)
		if !is4 || !on {
			continue // with it, each link's own is turned on
		}
		for _, name := range have.passing(want) {
			d.before = append(d.before, have.setting("net/ipv4/conf/"+name+"/forwarding", "1", "")...)
		}
	}
}

// lives says whether the link has routes from router advertisements.
func (r reading) lives(link string) bool { return r.advertisedBy[r.indexes[link]] }

// passing are the links that are not ours and that packets to be forwarded come
// in by: the underlay, which answers to pods come by, and what pods are attached
// to.
func (r reading) passing(want State) []string {
	var all []string
	if name := r.view.Underlay.Name; name != "" {
		all = append(all, name)
	}
	for _, b := range r.bearers {
		inside := false
		for _, n := range want.Firewall.Forward {
			inside = inside || n.Contains(b.addr.Addr()) && b.addr.Addr().Is4()
		}
		if inside && !slices.Contains(all, b.name) {
			all = append(all, b.name)
		}
	}
	return all
}
