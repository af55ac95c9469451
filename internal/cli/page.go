package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"time"

	"github.com/spf13/cobra"

	"culvert/internal/api"
	"culvert/internal/page"
)

func newPageCommand() *cobra.Command {
	var runDir, listen string
	c := &cobra.Command{
		Use:   "page",
		Short: "Serve the daemon's page to a browser on this machine",
		Long: `Serve the node daemon's page, which the daemon has on its unix socket, over HTTP on
loopback until interrupted: the links from this node, the other nodes, and warnings
with their fixes. The page is read-only.

The daemon also serves the page on its --metrics address. This command is for a daemon
without that address, and for one in another network namespace, such as the demo's.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			asking, cancel := context.WithTimeout(c.Context(), 5*time.Second)
			defer cancel()
			if _, err := api.GetStatus(asking, runDir); err != nil {
				return err
			}
			l, err := net.Listen("tcp", listen)
			if err != nil {
				return fmt.Errorf("serving the page: %w (choose another address with --listen)", err)
			}
			if a, ok := l.Addr().(*net.TCPAddr); !ok || !a.IP.IsLoopback() {
				_ = l.Close()
				return usagef("--listen %s: must be a loopback address, since the page has no password", listen)
			}
			proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: "culvert", Path: "/page"})
			proxy.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, "unix", api.SocketPath(runDir))
			}}
			s := &http.Server{Handler: page.LoopbackOnly(proxy), ReadHeaderTimeout: 5 * time.Second}
			stop := context.AfterFunc(c.Context(), func() { _ = s.Close() })
			defer stop()
			fmt.Fprintf(c.OutOrStdout(), "http://%s/\n", l.Addr())
			if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return err
			}
			return nil
		},
	}
	c.Flags().StringVar(&runDir, "run-dir", api.DefaultRunDir, "the daemon's --run-dir")
	c.Flags().StringVar(&listen, "listen", "127.0.0.1:0", "listen address; port 0 chooses a free port")
	return c
}
