package daemon

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/internal/httpd"
	"culvert/internal/remedy"
)

// sockets are what only one daemon of a node can have at a time, besides the
// datapath: the lock of the network namespace, the run directory with its socket, and
// the listen address of metrics and probes. All are descriptors, which a handover
// passes on (package handover): connections made in between wait in the kernel's
// backlog for the successor.
type sockets struct {
	owner   *host.Ownership
	socket  *api.Socket
	api     *httpd.Service // on the socket
	metrics *httpd.Service // nil without --metrics
	// passed means that another daemon uses them, the successor or still the
	// predecessor: do not remove them when this process ends.
	passed bool
}

// openSockets opens the sockets if no daemon runs.
func (d *node) openSockets(ctx context.Context) error {
	own, err := host.AwaitOwn(ctx, d.options.owner(), ownerTimeout)
	if owned, ok := errors.AsType[*host.OwnedError](err); ok && owned.By.Same(d.options.owner()) {
		what, do := remedy.Split(err)
		return remedy.Errorf(do+", or start this one with --replace, which takes over from it", "%s", what)
	}
	if err != nil {
		return err
	}
	p := &d.sockets
	p.owner = own
	if p.socket, err = api.Open(d.options.RunDir, d.options.SocketGroup); err != nil {
		return err
	}
	_, listener := p.socket.Descriptors()
	p.api = httpd.New(listener, d.socketHandler(), d.log)
	if d.options.Metrics != "" {
		fd, err := listenMetrics(d.options.Metrics)
		if err != nil {
			return err
		}
		if p.metrics, err = d.metricsService(fd); err != nil {
			return err
		}
	}
	return p.serve()
}

// listenMetrics opens the address of metrics and probes.
func listenMetrics(address string) (fd int, err error) {
	if fd, err = httpd.ListenTCP(address); err != nil {
		return -1, remedy.Errorf("choose another address with --metrics, or \"\" for none", "serving metrics: %w", err)
	}
	return fd, nil
}

// serve starts serving the socket and, if configured, metrics.
func (p *sockets) serve() error {
	err := p.api.Start()
	if p.metrics != nil {
		err = errors.Join(err, p.metrics.Start())
	}
	return err
}

// pause stops accepting connections; requests on accepted ones are answered.
func (p *sockets) pause() {
	p.owner.Pause()
	p.api.Pause()
	if p.metrics != nil {
		p.metrics.Pause()
	}
}

// close stops serving and closes the sockets; if passed, it closes only this
// process's descriptors.
func (p *sockets) close() {
	if p.api != nil {
		p.api.Stop()
	}
	if p.metrics != nil {
		p.metrics.Stop()
		_ = unix.Close(p.metrics.Descriptor())
	}
	switch {
	case p.socket == nil:
	case p.passed:
		_ = p.socket.Leave()
	default:
		_ = p.socket.Close()
	}
	if p.owner != nil {
		p.owner.Release()
	}
}
