package kube

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"culvert/subnet"
)

// DefaultPrefix is flannel's default prefix of annotations.
const DefaultPrefix = "flannel.alpha.coreos.com"

// podCIDRsAnnotation is the one annotation that flannel does not have: the Node's
// UID and its podCIDRs, for nodes that watch only metadata.
const podCIDRsAnnotation = "culvert/pod-cidrs"

// names are the keys of flannel's annotations.
type names struct {
	managed, backend             string
	data, public, overwrite      string // IPv4
	dataV6, publicV6, overwrite6 string // IPv6
	node, node6                  string // the node's own address, of IPv4 and IPv6
}

// newNames completes a prefix as flannel does: it appends a slash if there is none,
// and then a hyphen unless the prefix ends in a slash or hyphen.
func newNames(prefix string) names {
	if !strings.Contains(prefix, "/") {
		prefix += "/"
	}
	if !strings.HasSuffix(prefix, "/") && !strings.HasSuffix(prefix, "-") {
		prefix += "-"
	}
	return names{
		managed: prefix + "kube-subnet-manager", backend: prefix + "backend-type",
		data: prefix + "backend-data", public: prefix + "public-ip", overwrite: prefix + "public-ip-overwrite",
		dataV6: prefix + "backend-v6-data", publicV6: prefix + "public-ipv6", overwrite6: prefix + "public-ipv6-overwrite",
		node: prefix + "node-public-ip", node6: prefix + "node-public-ipv6",
	}
}

// object is the part of a Node that is used. The spec and the status are empty in
// metadata.
type object struct {
	Metadata struct {
		Name              string            `json:"name"`
		UID               string            `json:"uid"`
		ResourceVersion   string            `json:"resourceVersion"`
		CreationTimestamp time.Time         `json:"creationTimestamp"`
		Annotations       map[string]string `json:"annotations"`
	} `json:"metadata"`
	Spec struct {
		PodCIDR  string   `json:"podCIDR"`
		PodCIDRs []string `json:"podCIDRs"`
	} `json:"spec"`
	Status struct {
		Conditions []struct {
			Type   string `json:"type"`
			Status string `json:"status"`
		} `json:"conditions"`
	} `json:"status"`
}

// revision returns the resource version as a number, 0 if it is not one.
func revision(text string) int64 {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// podCIDRs returns the Node's subnets, IPv4 first; none if not assigned yet.
func (o *object) podCIDRs() ([]netip.Prefix, error) {
	texts := o.Spec.PodCIDRs
	if len(texts) == 0 && o.Spec.PodCIDR != "" {
		texts = []string{o.Spec.PodCIDR}
	}
	return parseCIDRs(texts)
}

// parseCIDRs accepts at most one prefix of each family.
func parseCIDRs(texts []string) ([]netip.Prefix, error) {
	if len(texts) > 2 {
		return nil, fmt.Errorf("%d podCIDRs; at most one of each address family is supported", len(texts))
	}
	var all []netip.Prefix
	for _, text := range texts {
		p, err := netip.ParsePrefix(text)
		switch {
		case err != nil || p.Addr().Is4In6() || p.Bits() == 0:
			return nil, fmt.Errorf("podCIDR %q is not a subnet", text)
		case p != p.Masked():
			return nil, fmt.Errorf("podCIDR %s has host bits set", p)
		case len(all) == 1 && all[0].Addr().Is4() == p.Addr().Is4():
			return nil, fmt.Errorf("podCIDRs %s and %s are of the same address family", all[0], p)
		}
		all = append(all, p)
	}
	slices.SortFunc(all, func(a, b netip.Prefix) int { return cmp.Compare(a.Addr().BitLen(), b.Addr().BitLen()) })
	return all, nil
}

// facts is what the mirror stores of a Node.
type facts struct {
	uid      string
	created  int64 // Unix time; of two conflicting Nodes the older wins
	revision int64
	cidrs    []netip.Prefix // of all families; empty: unknown
	fromSpec bool           // cidrs are from the spec, not from the annotation
	managed  bool           // flannel or culvert runs on it
	notes    notes
}

// notes are the values of the relevant annotations.
type notes struct {
	backend                      string
	data, public, overwrite      string
	dataV6, publicV6, overwrite6 string
	podCIDRs                     string
}

// facts extracts the facts from the metadata and, if present, the spec.
func (n names) facts(o *object) (facts, error) {
	a := o.Metadata.Annotations
	f := facts{
		uid: o.Metadata.UID, created: o.Metadata.CreationTimestamp.Unix(), revision: revision(o.Metadata.ResourceVersion),
		managed: a[n.managed] == "true",
		notes: notes{
			backend: a[n.backend], data: a[n.data], public: a[n.public], overwrite: a[n.overwrite],
			dataV6: a[n.dataV6], publicV6: a[n.publicV6], overwrite6: a[n.overwrite6],
			podCIDRs: a[podCIDRsAnnotation],
		},
	}
	var err error
	if f.cidrs, err = o.podCIDRs(); err != nil || len(f.cidrs) > 0 {
		f.fromSpec = err == nil
		return f, err
	}
	// The annotation repeats them. One with another UID was copied from another
	// Node, such as this one's predecessor.
	uid, list, _ := strings.Cut(f.notes.podCIDRs, " ")
	if uid == f.uid && list != "" {
		f.cidrs, err = parseCIDRs(strings.Split(list, ","))
	}
	return f, err
}

// disputed returns the Nodes whose podCIDRs are known only from their annotation
// and overlap another Node's or ours: a node could write another's podCIDRs into
// its annotation.
func disputed(nodes map[string]facts, ours []netip.Prefix) []string {
	type claim struct {
		prefix netip.Prefix
		name   string
	}
	var claims []claim
	for _, p := range ours {
		claims = append(claims, claim{prefix: p})
	}
	for name, f := range nodes {
		if !f.managed {
			continue
		}
		for _, p := range f.cidrs {
			claims = append(claims, claim{p, name})
		}
	}
	// Sorted, a prefix precedes those within it; two prefixes are disjoint or nested.
	slices.SortFunc(claims, func(a, b claim) int {
		return cmp.Or(a.prefix.Addr().Compare(b.prefix.Addr()), cmp.Compare(a.prefix.Bits(), b.prefix.Bits()))
	})
	var all []string
	add := func(name string) {
		if name != "" && !nodes[name].fromSpec && !slices.Contains(all, name) {
			all = append(all, name)
		}
	}
	for i := 1; i < len(claims); i++ {
		cover := claims[i-1]
		for ; i < len(claims) && cover.prefix.Overlaps(claims[i].prefix); i++ {
			if claims[i].name != cover.name {
				add(cover.name)
				add(claims[i].name)
			}
		}
	}
	return all
}

// podCIDRsNote returns the value of podCIDRsAnnotation.
func podCIDRsNote(uid string, cidrs []netip.Prefix) string {
	texts := make([]string, len(cidrs))
	for i, c := range cidrs {
		texts[i] = c.String()
	}
	return uid + " " + strings.Join(texts, ",")
}

// leaseValue is a lease as flannel writes it to etcd, for subnet.ParseLease.
type leaseValue struct {
	PublicIP      string          `json:",omitempty"`
	PublicIPv6    *string         `json:",omitempty"`
	BackendType   string          `json:",omitempty"`
	BackendData   json.RawMessage `json:",omitempty"`
	BackendV6Data json.RawMessage `json:",omitempty"`
	NodeID        string
}

var errNoPodCIDR = errors.New("it has flannel's annotations but no podCIDR")

// entry returns a managed Node as an entry whose lease covers the configuration's
// families, or with the reason why it has none. It leaves out a family without an
// address: while a cluster moves to dual stack, other nodes may not have one yet.
func (f facts) entry(name string, cfg subnet.Config) subnet.Entry {
	e := subnet.Entry{CreateRevision: f.created, ModRevision: f.revision}
	if len(f.cidrs) == 0 {
		return subnet.BadEntry(name, errNoPodCIDR)
	}
	v := leaseValue{BackendType: f.notes.backend, NodeID: name}
	var subnets []netip.Prefix
	for _, c := range f.cidrs {
		is4 := c.Addr().Is4()
		if _, ok := cfg.Network(is4); !ok {
			continue
		}
		public, data := f.notes.public, f.notes.data
		if !is4 {
			public, data = f.notes.publicV6, f.notes.dataV6
		}
		if public == "" {
			continue
		}
		var raw json.RawMessage
		if data != "" {
			if !json.Valid([]byte(data)) {
				return subnet.BadEntry(name, fmt.Errorf("its backend data %.80q is not JSON", data))
			}
			raw = json.RawMessage(data)
		}
		subnets = append(subnets, c)
		if is4 {
			v.PublicIP, v.BackendData = public, raw
		} else {
			v.PublicIPv6, v.BackendV6Data = &public, raw
		}
	}
	switch {
	case len(subnets) == 0:
		return subnet.BadEntry(name, fmt.Errorf("none of its podCIDRs %v has a public address in a family of the network", f.cidrs))
	case v.BackendType == "": // would be a reservation
		return subnet.BadEntry(name, errors.New("it has no backend type"))
	}
	var err error
	if e.Value, err = json.Marshal(v); err != nil {
		return subnet.BadEntry(name, err)
	}
	e.Key = subnet.FormatKey(subnets)
	e = subnet.NewEntry(e)
	if _, err := e.Lease(); err != nil {
		return subnet.BadEntry(name, err)
	}
	return e
}

// vxlanData is flannel's vxlanLeaseAttrs (pkg/backend/vxlan/vxlan.go).
type vxlanData struct {
	VNI     uint32
	VtepMAC string
}

// annotations returns the wanted annotations of the lease's Node: flannel's, byte
// for byte, and ours. An overwrite annotation replaces the node's own address while
// it exists.
func (n names) annotations(l subnet.Lease, f facts) (map[string]string, error) {
	want := map[string]string{
		n.managed: "true", n.backend: l.Backend, podCIDRsAnnotation: podCIDRsNote(f.uid, f.cidrs),
	}
	for _, e := range l.Endpoints {
		data := "null"
		if l.Backend == "vxlan" {
			text, err := json.Marshal(vxlanData{e.VTEP.VNI, e.VTEP.MAC.String()})
			if err != nil {
				return nil, err
			}
			data = string(text)
		}
		is4 := e.Subnet.Addr().Is4()
		dataKey, publicKey, overwriteKey, overwrite := n.data, n.public, n.overwrite, f.notes.overwrite
		if !is4 {
			dataKey, publicKey, overwriteKey, overwrite = n.dataV6, n.publicV6, n.overwrite6, f.notes.overwrite6
		}
		want[dataKey], want[publicKey] = data, e.Public.String()
		if overwrite != "" {
			a, err := annotatedAddr(overwriteKey, overwrite, is4)
			if err != nil {
				return nil, err
			}
			want[publicKey] = a.String()
		}
	}
	return want, nil
}

// annotatedAddr parses an annotation that the administrator writes.
func annotatedAddr(key, value string, is4 bool) (netip.Addr, error) {
	a, err := netip.ParseAddr(value)
	if err != nil || a.Is4() != is4 || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() {
		return netip.Addr{}, fmt.Errorf("the annotation %s is %.80q, not an address of its family: correct or remove it", key, value)
	}
	return a, nil
}

// nodeAddrs returns the addresses that the annotations node-public-ip and
// node-public-ipv6 of a Node give it.
func (n names) nodeAddrs(o *object) ([]netip.Addr, error) {
	var all []netip.Addr
	for _, key := range []string{n.node, n.node6} {
		value := o.Metadata.Annotations[key]
		if value == "" {
			continue
		}
		a, err := annotatedAddr(key, value, key == n.node)
		if err != nil {
			return nil, err
		}
		all = append(all, a)
	}
	return all, nil
}

// condition is the Node's NetworkUnavailable. While it is True, or missing if a
// cloud provider has set the taint, no pods are scheduled there.
type condition struct {
	Type               string    `json:"type"`
	Status             string    `json:"status"`
	Reason             string    `json:"reason"`
	Message            string    `json:"message"`
	LastTransitionTime time.Time `json:"lastTransitionTime"`
	LastHeartbeatTime  time.Time `json:"lastHeartbeatTime"`
}

// patch is a strategic merge patch of a Node's status. The UID makes the API server
// reject it if the Node was recreated meanwhile.
type patch struct {
	Metadata struct {
		UID         string             `json:"uid"`
		Annotations map[string]*string `json:"annotations,omitempty"` // nil removes
	} `json:"metadata"`
	Status *patchStatus `json:"status,omitempty"`
}

type patchStatus struct {
	Conditions []condition `json:"conditions"`
}

// newPatch returns the patch that sets the wanted annotations, and whether it
// changes anything.
func newPatch(o *object, want map[string]string) (patch, bool) {
	var p patch
	p.Metadata.UID = o.Metadata.UID
	p.Metadata.Annotations = map[string]*string{}
	for key, value := range want {
		if is, ok := o.Metadata.Annotations[key]; !ok || is != value {
			p.Metadata.Annotations[key] = &value
		}
	}
	return p, len(p.Metadata.Annotations) > 0
}

// removeAnnotations returns the patch that removes all annotations that newPatch writes. It
// leaves the overwrites, which belong to the administrator.
func (n names) removeAnnotations(o *object) (patch, bool) {
	var p patch
	p.Metadata.UID = o.Metadata.UID
	p.Metadata.Annotations = map[string]*string{}
	for _, key := range []string{n.managed, n.backend, n.data, n.public, n.dataV6, n.publicV6, podCIDRsAnnotation} {
		if _, ok := o.Metadata.Annotations[key]; ok {
			p.Metadata.Annotations[key] = nil
		}
	}
	return p, len(p.Metadata.Annotations) > 0
}

// networkUp adds the condition to the patch, unless the Node has it.
func (p *patch) networkUp(o *object, now time.Time) bool {
	for _, c := range o.Status.Conditions {
		if c.Type == "NetworkUnavailable" && c.Status == "False" {
			return false
		}
	}
	now = now.UTC().Truncate(time.Second)
	p.Status = &patchStatus{[]condition{{
		Type: "NetworkUnavailable", Status: "False", Reason: "CulvertIsUp", Message: "culvert is running on this node",
		LastTransitionTime: now, LastHeartbeatTime: now,
	}}}
	return true
}
