// Package page serves the daemon's page: the topology as this node sees it, as a drawing
// and as a table, with the warnings and their fixes. It is read-only, loads nothing from
// other hosts, and works without its script, which polls. It keeps no state: the daemon
// owns the status.
package page

import (
	"bytes"
	"embed"
	"fmt"
	"hash/fnv"
	"html/template"
	"net"
	"net/http"
	"net/netip"
	"strings"

	"culvert/internal/api"
)

//go:embed page.html page.css page.js
var files embed.FS

var pageTemplate = template.Must(template.New("page.html").Funcs(template.FuncMap{
	"bytes": size, "milliseconds": milliseconds, "plural": plural,
}).ParseFS(files, "page.html"))

// Handler serves the page at /, and its files.
func Handler(status func() api.Status, peers func() api.Peers) http.Handler {
	mux := http.NewServeMux()
	look := func(r *http.Request) view { return viewOf(status(), peers(), r.URL.Query().Get("q")) }
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		var b bytes.Buffer
		if err := pageTemplate.Execute(&b, look(r)); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_, _ = b.WriteTo(w)
	})
	mux.HandleFunc("GET /page.json", func(w http.ResponseWriter, r *http.Request) { api.WriteJSON(w, look(r).live()) })
	for _, name := range []string{"page.css", "page.js"} {
		mux.HandleFunc("GET /"+name, func(w http.ResponseWriter, r *http.Request) { http.ServeFileFS(w, r, files, name) })
	}
	return secured(mux)
}

// secured restricts the page to its own files (Content-Security-Policy).
func secured(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cache-Control", "no-store")
		next.ServeHTTP(w, r)
	})
}

// LoopbackOnly restricts next to clients on this host, whatever address the listener has,
// and to requests by a loopback address, so that another site's page cannot read it (DNS
// rebinding).
func LoopbackOnly(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, err := netip.ParseAddrPort(r.RemoteAddr)
		name, _, noPort := net.SplitHostPort(r.Host)
		if noPort != nil {
			name = strings.Trim(r.Host, "[]")
		}
		addr, notAddr := netip.ParseAddr(name)
		switch {
		case err != nil || !from.Addr().Unmap().IsLoopback():
			http.Error(w, "this page is served to this host only: run ssh -L 9472:127.0.0.1:9472 HOST, then open http://127.0.0.1:9472/", http.StatusForbidden)
		case name != "localhost" && (notAddr != nil || !addr.IsLoopback()):
			http.Error(w, "open http://127.0.0.1/ with this port", http.StatusForbidden)
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// live is the answer that the script polls.
type live struct {
	Version string     `json:"version"` // changes when the page must be reloaded
	At      int64      `json:"at"`      // milliseconds of Unix time
	State   string     `json:"state"`
	Summary string     `json:"summary"`
	Rows    []liveRow  `json:"rows"`
	Groups  []liveMark `json:"marks"`
}

type liveRow struct {
	ID       string `json:"id"`
	State    string `json:"state"`
	RTT      string `json:"rtt"`
	Heard    string `json:"heard"`
	Sent     *int64 `json:"sent"`
	Received *int64 `json:"received"`
	Drops    *int64 `json:"drops"`
}

type liveMark struct {
	ID    string `json:"id"`
	State string `json:"state"`
	Label string `json:"label"`
}

func (v view) live() live {
	l := live{Version: v.Version, At: v.At.UnixMilli(), State: v.State, Summary: v.Summary, Rows: []liveRow{}, Groups: []liveMark{}}
	for _, r := range v.Rows {
		l.Rows = append(l.Rows, liveRow{ID: r.ID, State: r.State, RTT: r.RTT, Heard: r.Heard, Sent: r.Sent, Received: r.Received, Drops: r.Drops})
	}
	for _, m := range v.Marks {
		l.Groups = append(l.Groups, liveMark{m.ID, m.State, m.Label})
	}
	return l
}

// version identifies the parts of the page that the script cannot update.
func (v view) version() string {
	h := fnv.New64a()
	for _, r := range v.Rows {
		fmt.Fprintln(h, r.ID)
	}
	for _, m := range v.Marks {
		fmt.Fprintln(h, m.ID, m.More)
	}
	for _, w := range v.Warnings {
		fmt.Fprintln(h, w.Check, w.Fix)
	}
	fmt.Fprintln(h, v.Node, v.Total)
	return fmt.Sprintf("%x", h.Sum64())
}

func size(n int64) string {
	v, units := float64(n), []string{"B", "kB", "MB", "GB", "TB", "PB"}
	for len(units) > 1 && v >= 1000 {
		v, units = v/1000, units[1:]
	}
	if units[0] == "B" {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", v, units[0])
}

func milliseconds(seconds float64) string {
	if seconds == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f ms", seconds*1000)
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
