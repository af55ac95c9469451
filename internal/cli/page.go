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
		Long: `Serve the page of the node daemon on this machine, which it has on its unix
socket, over HTTP on loopback, until it is interrupted: the links from this node,
the other nodes, and warnings with their fixes. It only reads.

The daemon serves the same page by itself on its --metrics address. This command
is for one without, and for a daemon in another network namespace, such as the
demo's.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			asking, cancel := context.WithTimeout(c.Context(), 5*time.Second)
			defer cancel()
			if _, err := api.GetStatus(asking, runDir); err != nil {
				return err
			}
			l, err := net.Listen("tcp", listen)
			if err != nil {
				return fmt.Errorf("serving the page: %w (take another address with --listen)", err)
			}
			if a, ok := l.Addr().(*net.TCPAddr); !ok || !a.IP.IsLoopback() {
				_ = l.Close()
				return usagef("--listen %s: an address of loopback, since the page asks for no password", listen)
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
	c.Flags().StringVar(&listen, "listen", "127.0.0.1:0", "where to serve; port 0 takes one that is free")
	return c
}
