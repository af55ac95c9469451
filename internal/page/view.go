package page

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"culvert/internal/api"
)

// view is what the page shows.
type view struct {
	Node, Ready, State, Summary, Lease, Underlay, Datapath, Store string
	Version                                                       string
	At                                                            time.Time
	Warnings                                                      []api.Warning
	Query                                                         string
	Rows                                                          []row
	Total, Matching                                               int
	Marks                                                         []mark
	Mesh                                                          []line // between the others
	Grouped                                                       string // by what, or empty
	Box                                                           string // of the drawing
	Few                                                           bool   // nodes in it
}

// row is one node in the table.
type row struct {
	ID, Name, Subnets, Address, Way, State, RTT, MTU, Heard, Problem string
	Sent, Received, Drops                                            *int64
}

// mark is one node, or a group of them, in the drawing.
type mark struct {
	ID, Name, More, State, Label, Target string
	Part                                 float64 // silent share of a group, in percent
	Count                                int
	X, Y, R, LabelX, LabelY              float64
	Anchor                               string
	// MidX and MidY are the position of the link's figures.
	MidX, MidY float64
}

type line struct{ X1, Y1, X2, Y2 float64 }

const (
	// mostRows is the maximum number of rows of the table, the worst first.
	mostRows = 250
	// mostMarks is the maximum number of nodes that are drawn individually.
	mostMarks = 28
	// mostGroups is how many groups are: their labels have two lines.
	mostGroups = 20
	// mostMesh is the maximum number of nodes for which the links between other nodes are
	// drawn.
	mostMesh = 28

	width, height = 920.0, 620.0
)

// node is a peer with all of its subnets.
type node struct {
	name    string
	first   netip.Addr
	states  []api.PeerState
	worst   string
	problem string
}

var severity = map[string]int{api.PeerActive: 0, api.PeerIdle: 1, api.PeerUnknown: 2, api.PeerSilent: 3}

func nodesOf(peers []api.PeerState) (all []node) {
	at := make(map[string]int)
	for _, p := range peers {
		name := cmp.Or(p.Node, p.PublicIP.String())
		i, ok := at[name]
		if !ok {
			i = len(all)
			at[name] = i
			all = append(all, node{name: name, first: p.PublicIP, worst: p.State})
		}
		n := &all[i]
		n.states = append(n.states, p)
		if severity[p.State] > severity[n.worst] {
			n.worst = p.State
		}
		if n.problem == "" && p.Problem != "" {
			n.problem = fmt.Sprintf("%s: %s", p.Subnet, p.Problem)
		}
	}
	return all
}

func (n node) row(now time.Time) row {
	r := row{ID: "n-" + n.name, Name: n.name, State: n.worst, RTT: "-", MTU: "-", Heard: "-", Problem: n.problem}
	var subnets, addresses []string
	var rtt float64
	var heard time.Time
	for _, p := range n.states {
		subnets = append(subnets, p.Subnet.String())
		if a := p.PublicIP.String(); !slices.Contains(addresses, a) {
			addresses = append(addresses, a)
		}
		r.Way = p.Way
		rtt = max(rtt, p.RTTSeconds)
		if p.Heard.After(heard) {
			heard = p.Heard
		}
		if p.PathMTU > 0 {
			r.MTU = fmt.Sprint(p.PathMTU)
		}
		add(&r.Sent, p.Sent)
		add(&r.Received, p.Received)
		if p.Drops != nil {
			add(&r.Drops, &api.PeerCount{Bytes: *p.Drops})
		}
	}
	r.Subnets, r.Address = strings.Join(subnets, ", "), strings.Join(addresses, ", ")
	r.RTT = milliseconds(rtt)
	if !heard.IsZero() {
		r.Heard = max(0, now.Sub(heard)).Round(time.Second).String() + " ago"
	}
	return r
}

func add(to **int64, c *api.PeerCount) {
	if c == nil {
		return
	}
	if *to == nil {
		*to = new(int64)
	}
	**to += int64(c.Bytes)
}

// viewOf computes the page. query filters the rows of the table.
func viewOf(s api.Status, p api.Peers, query string) view {
	v := view{
		Node: s.Node, Ready: "ready", At: p.At, Warnings: s.Warnings, Query: query,
		Underlay: fmt.Sprintf("%s, MTU %d", s.Underlay.Interface, s.Underlay.MTU),
		Datapath: fmt.Sprintf("%s, %s, pods' MTU %d", s.Datapath.WireFormat, s.Datapath.Kind, s.Datapath.MTU),
		Store:    s.Store.Name() + ", connected",
	}
	if f := s.Datapath.FastPath; f != nil && f.On {
		v.Datapath += ", fast path"
		if f.Pods.Carries() {
			v.Datapath += " from pod to pod"
		}
	}
	if !s.Store.Connected {
		v.Store = s.Store.Name() + " is unreachable: " + cmp.Or(s.Store.Error, "not reached yet")
	}
	if s.Lease != nil {
		var all []string
		for _, n := range s.Lease.Subnets {
			all = append(all, n.String())
		}
		v.Lease = strings.Join(all, ", ")
	} else {
		v.Lease = "none"
	}
	v.State = "ready"
	if !s.Ready {
		v.State, v.Ready = "not-ready", "not ready: "+s.NotReady
	}
	nodes := nodesOf(p.Peers)
	v.Total = len(nodes)
	v.Summary = summary(nodes)
	slices.SortStableFunc(nodes, func(a, b node) int {
		return cmp.Or(severity[b.worst]-severity[a.worst], cmp.Compare(b.problem, a.problem), cmp.Compare(a.name, b.name))
	})
	for _, n := range nodes {
		r := n.row(p.At)
		if !n.matches(r, query) {
			continue
		}
		if v.Matching++; len(v.Rows) < mostRows {
			v.Rows = append(v.Rows, r)
		}
	}
	v.draw(nodes)
	v.Version = v.version()
	return v
}

// matches reports whether the row of n is asked for: by a text in it, or by a prefix of its
// underlay address.
func (n node) matches(r row, query string) bool {
	if p, err := netip.ParsePrefix(query); err == nil && p.Contains(n.first) {
		return true
	}
	return strings.Contains(strings.ToLower(r.Name+" "+r.Subnets+" "+r.Address+" "+r.State), strings.ToLower(query))
}

func summary(nodes []node) string {
	states := make(map[string]int)
	for _, n := range nodes {
		states[n.worst]++
	}
	var words []string
	for _, s := range []string{api.PeerActive, api.PeerIdle, api.PeerSilent, api.PeerUnknown} {
		if states[s] > 0 {
			words = append(words, fmt.Sprintf("%d %s", states[s], s))
		}
	}
	if len(words) == 0 {
		return "no other node"
	}
	return plural(len(nodes), "other node", "other nodes") + ": " + strings.Join(words, ", ")
}

// draw places the nodes on an ellipse around this one; many of them as groups by
// their underlay addresses.
func (v *view) draw(nodes []node) {
	slices.SortFunc(nodes, func(a, b node) int { return cmp.Or(a.first.Compare(b.first), cmp.Compare(a.name, b.name)) })
	if len(nodes) <= mostMarks {
		for _, n := range nodes {
			r := n.row(v.At)
			m := mark{ID: "m-" + n.name, Name: n.name, State: n.worst, Count: 1, R: 9, Label: r.RTT, Target: "#" + r.ID}
			switch {
			case n.worst == api.PeerSilent:
				m.Label = "no answer"
			case r.RTT == "-":
				m.Label = ""
			}
			v.Marks = append(v.Marks, m)
		}
	} else {
		v.group(nodes)
	}
	const middleX, middleY = width / 2, height / 2
	first := -math.Pi / 2
	radius := width * 0.33
	v.Box = "0 0 920 620"
	if v.Few = len(v.Marks) < 3; v.Few { // beside this node, with the names below, so that they fit a narrow screen
		first, radius, v.Box = 0, 160, "210 230 500 160"
	}
	for i := range v.Marks {
		m := &v.Marks[i]
		angle := 2*math.Pi*float64(i)/float64(len(v.Marks)) + first
		cos, sin := math.Cos(angle), math.Sin(angle)
		m.X, m.Y = middleX+cos*radius, middleY+sin*height*0.38
		m.LabelX, m.LabelY, m.Anchor = m.X+cos*(m.R+8), m.Y+sin*(m.R+14)+4, "middle"
		if m.More != "" && sin < 0.3 {
			m.LabelY -= 8 - 10*sin // for the second line
			if sin > -0.3 {
				m.LabelY = m.Y - 4
			}
		}
		if v.Few {
			m.LabelX, m.LabelY = m.X, m.Y+36 // beside this node's name
		} else if cos > 0.25 {
			m.Anchor = "start"
		} else if cos < -0.25 {
			m.Anchor = "end"
		}
		// Place the figures near the far end, where links are furthest apart, alternately
		// closer.
		at := 0.62
		if i%2 == 1 && len(v.Marks) > 8 {
			at = 0.78
		}
		m.MidX, m.MidY = middleX+(m.X-middleX)*at, middleY+(m.Y-middleY)*at
	}
	if len(v.Marks) <= mostMesh && v.Grouped == "" {
		for i, a := range v.Marks {
			for _, b := range v.Marks[i+1:] {
				v.Mesh = append(v.Mesh, line{a.X, a.Y, b.X, b.Y})
			}
		}
	}
}

// group makes one mark of all nodes whose underlay addresses share a prefix: the longest
// prefix length that gives few marks.
func (v *view) group(nodes []node) {
	groups := make(map[netip.Prefix][]node)
	for less := 2; ; less++ {
		clear(groups)
		for _, n := range nodes {
			p, _ := n.first.Prefix(max(0, n.first.BitLen()-less*n.first.BitLen()/32))
			groups[p] = append(groups[p], n)
		}
		if len(groups) <= mostGroups || less >= 32 {
			v.Grouped = fmt.Sprintf("underlay addresses (/%d)", max(0, 32-less))
			break
		}
	}
	for _, p := range slices.SortedFunc(maps.Keys(groups), netip.Prefix.Compare) {
		m := mark{ID: "m-" + p.String(), Name: p.String(), State: api.PeerActive, Count: len(groups[p]), Target: "?q=" + url.QueryEscape(p.String()) + "#nodes"}
		silent, times, states := 0, []float64{}, make(map[string]int)
		for _, n := range groups[p] {
			states[n.worst]++
			if n.worst == api.PeerSilent {
				silent++
			}
			for _, s := range n.states {
				if s.RTTSeconds > 0 {
					times = append(times, s.RTTSeconds)
				}
			}
		}
		m.R = 7 + 3*math.Log2(float64(1+m.Count))/2
		for state, n := range states {
			if n > states[m.State] || n == states[m.State] && severity[state] > severity[m.State] {
				m.State = state
			}
		}
		m.More = plural(m.Count, "node", "nodes")
		slices.Sort(times)
		if len(times) > 0 {
			m.Label = milliseconds(times[len(times)/2])
		}
		if silent > 0 {
			m.More += fmt.Sprintf(", %d silent", silent)
			m.Part = max(8, 100*float64(silent)/float64(m.Count))
		}
		v.Marks = append(v.Marks, m)
	}
}
