package daemon

import (
	"errors"
	"fmt"
	"net/http"
	"time"

	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/api/readiness"
	"culvert/internal/handover"
	"culvert/internal/httpd"
	"culvert/internal/metrics"
	"culvert/internal/page"
)

// socketHandler serves the daemon's unix socket.
func (d *node) socketHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", d.state.socket())
	if recent := d.options.Recent; recent != nil {
		mux.HandleFunc("GET "+api.LogPath, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			_, _ = w.Write(recent.Bytes())
		})
	}
	mux.Handle(handover.Path, handover.Handler(func(c *handover.Conn, hello handover.Message) {
		select {
		case d.requests <- request{c, hello}:
		case <-time.After(requestTimeout):
			_ = c.Send(handover.Message{Step: handover.Back, Why: "it is handing over to another daemon, or changing its state: try again"})
			_ = c.Close()
		}
	}))
	return mux
}

// socket serves status, peers, page and readiness on the daemon's unix socket.
func (st *state) socket() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", api.Handler(st.status, st.peers, st.look))
	mux.Handle("GET /page/", http.StripPrefix("/page", page.Handler(st.status, st.peers)))
	mux.Handle(readiness.Path, api.ReadinessHandler(func() readiness.Answer { return st.readiness(time.Now()) }))
	return mux
}

// probes serves /metrics and, to loopback clients, the page, both guarded by access,
// and /livez and /readyz.
func probes(st *state, access httpd.Access) http.Handler {
	figures := metrics.Handler(metrics.Source{Status: st.status, Peers: st.peers, Requests: st.requests})
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", access.Guard(figures))
	mux.Handle("GET /", page.LoopbackOnly(access.Guard(page.Handler(st.status, st.peers))))
	// A daemon that answers is alive. An unreachable store does not count: a restart
	// would not bring it back.
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	// The same answer as the CNI plugin's, which does not query the datapath: a probe
	// that waits for a repair would time out.
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if a := st.readiness(time.Now()); !a.Ready {
			http.Error(w, a.Reason, http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}

// metricsService returns the service of metrics and probes on a listening socket. On error it
// closes the socket.
func (d *node) metricsService(fd int) (*httpd.Service, error) {
	s, err := d.options.MetricsAccess.Service(fd, probes(d.state, d.options.MetricsAccess), d.log)
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return s, nil
}
