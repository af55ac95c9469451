package cli

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"
)

// demoResult is what `culvert demo -o json` prints.
type demoResult struct {
	OK        bool       `json:"ok"`
	Nodes     []demoNode `json:"nodes"`
	Pods      []demoPod  `json:"pods"`
	Pings     []demoPing `json:"pings"`
	Transfers []demoFlow `json:"transfers"`
}

type demoNode struct {
	Name     string       `json:"name"`
	Underlay netip.Addr   `json:"underlay"`
	Subnet   netip.Prefix `json:"subnet"`
	Datapath string       `json:"datapath"`
	MTU      int          `json:"mtu"` // of its pods
}

type demoPod struct {
	Name    string     `json:"name"`
	Node    string     `json:"node"`
	Address netip.Addr `json:"address"`
}

// demoPing is a ping in one direction between two pods, or a pod and a remote node.
type demoPing struct {
	From  string  `json:"from"`
	To    string  `json:"to"`
	OK    bool    `json:"ok"`
	RTTms float64 `json:"rtt_ms"`
	// NAT means that the far end saw a translated source address.
	NAT bool `json:"nat"`

	why error
}

// demoFlow is one TCP transfer between pods of two nodes.
type demoFlow struct {
	From string  `json:"from"`
	To   string  `json:"to"`
	OK   bool    `json:"ok"`
	Gbps float64 `json:"gbps"`

	why error
}

// good reports whether all pings succeeded without NAT and all transfers were intact.
func (r demoResult) good() bool {
	return !slices.ContainsFunc(r.Pings, func(p demoPing) bool { return !p.OK || p.NAT }) &&
		!slices.ContainsFunc(r.Transfers, func(t demoFlow) bool { return !t.OK })
}

// report prints the result as one JSON object or as tables.
func (d *demo) report() error {
	if d.json {
		return writeJSON(d.out, d.Result)
	}
	var b strings.Builder
	d.Result.table(&b)
	_, err := io.WriteString(d.out, b.String())
	return err
}

// wideDemo is the maximum number of columns of the ping table; with more, it shows nodes
// instead of pods.
const wideDemo = 13

func (r demoResult) table(w io.Writer) {
	if len(r.Pods) == 0 {
		return
	}
	t := newColumns(w)
	fmt.Fprintf(t, "\nNODE\tUNDERLAY\tSUBNET\tDATAPATH\tMTU\tPODS\n")
	for _, n := range r.Nodes {
		var pods []string
		for _, p := range r.Pods {
			if p.Node == n.Name {
				pods = append(pods, fmt.Sprintf("%s %s", p.Name, p.Address))
			}
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%s\n", n.Name, n.Underlay, n.Subnet, n.Datapath, n.MTU, strings.Join(pods, ", "))
	}
	_ = t.Flush()

	if len(r.Pings) > 0 {
		r.pingTable(w)
	}
	if len(r.Transfers) > 0 {
		fmt.Fprintf(t, "\nTRANSFER\tBYTES\tSHA-256\tGBIT/S\n")
		for _, f := range r.Transfers {
			sum, rate := "matches", fmt.Sprintf("%.2f", f.Gbps)
			if !f.OK {
				sum, rate = "FAILED", "-"
			}
			fmt.Fprintf(t, "%s to %s\t%d\t%s\t%s\n", f.From, f.To, demoTransfer, sum, rate)
		}
		_ = t.Flush()
	}

	reached, natted, intact := 0, 0, 0
	for _, p := range r.Pings {
		if p.OK {
			reached++
		}
		if p.NAT {
			natted++
		}
	}
	for _, f := range r.Transfers {
		if f.OK {
			intact++
		}
	}
	fmt.Fprintf(w, "\n%d of %d pairs reached, %d of them translated (NAT), %d of %d transfers intact.\n",
		reached, len(r.Pings), natted, intact, len(r.Transfers))
}

// pingTable prints the round-trip times from each row to each column: between pods and
// nodes, or only nodes if there are too many.
func (r demoResult) pingTable(w io.Writer) {
	group := func(name string) string { return name }
	var names []string
	for _, n := range r.Nodes {
		names = append(names, n.Name)
	}
	what := "pod or node"
	if len(r.Nodes)+len(r.Pods) > wideDemo {
		what = "node, the slowest of its pods"
		of := map[string]string{}
		for _, p := range r.Pods {
			of[p.Name] = p.Node
		}
		group = func(name string) string {
			if n, ok := of[name]; ok {
				return n
			}
			return name
		}
	} else {
		for _, p := range r.Pods {
			names = append(names, p.Name)
		}
	}

	cells := map[[2]string][]demoPing{}
	for _, p := range r.Pings {
		k := [2]string{group(p.From), group(p.To)}
		cells[k] = append(cells[k], p)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "\nRound-trip times in ms, from each row to each column (%s):\n", what)
	fmt.Fprintf(t, "\t%s\t\n", strings.Join(names, "\t"))
	for _, from := range names {
		fmt.Fprintf(t, "%s\t", from)
		for _, to := range names {
			fmt.Fprintf(t, "%s\t", pingCell(cells[[2]string{from, to}]))
		}
		fmt.Fprintln(t)
	}
	_ = t.Flush()
}

// pingCell formats the worst of some pings.
func pingCell(pings []demoPing) string {
	if len(pings) == 0 {
		return "."
	}
	slowest := 0.0
	for _, p := range pings {
		switch {
		case !p.OK:
			return "FAILED"
		case p.NAT:
			return "NAT"
		}
		slowest = max(slowest, p.RTTms)
	}
	return fmt.Sprintf("%.2f", slowest)
}

// showLogs prints the failures and the last log lines of the daemons concerned.
func (d *demo) showLogs() {
	const most = 5 // of each
	var reasons, nodes []string
	fail := func(why error, ends ...string) {
		reasons = append(reasons, fmt.Sprint(why))
		for _, e := range ends {
			node, _, _ := strings.Cut(e, "-")
			if !slices.Contains(nodes, node) {
				nodes = append(nodes, node)
			}
		}
	}
	for _, p := range d.Result.Pings {
		if !p.OK || p.NAT {
			fail(p.why, p.From, p.To)
		}
	}
	for _, f := range d.Result.Transfers {
		if !f.OK {
			fail(f.why, f.From, f.To)
		}
	}
	for i, r := range reasons {
		if i == most {
			fmt.Fprintf(d.progress.w, "... and %d more\n", len(reasons)-most)
			break
		}
		fmt.Fprintln(d.progress.w, r)
	}
	for i, n := range nodes {
		p := d.daemons[n]
		if p == nil || i >= most {
			continue
		}
		state := "runs"
		select {
		case <-p.Exited():
			state = fmt.Sprintf("has ended (%v)", p.Err())
		default:
		}
		fmt.Fprintf(d.progress.w, "\nThe daemon of %s %s. It said last:\n%s\n", n, state, p.Tail(15))
	}
}
