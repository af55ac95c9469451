package bench

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/safchain/ethtool"

	"culvert/bench/load"
	"culvert/internal/host"
)

// Of two real hosts one is the server and one the client. Each runs its part of a
// datapath. The client sends the traffic, keeps the report and controls the server
// over one TCP connection, with one line of JSON per request and per response:
//
//	client                                  server
//	proof                  <- challenge
//	hello                  ->               describes its machine, its underlay's link
//	start part             ->               starts `bench node` in its own namespace
//	open, read, close      ->               load.Local
//	cost of a part         ->               costHere
//	stop part              ->               stops it
//
// When the connection ends, the server stops everything that it started for it.

// DefaultPort is the server's default TCP port.
const DefaultPort = 8475

// protocol is the version of the protocol.
const protocol = 3

type request struct {
	Do      string    `json:"do"`
	Proof   string    `json:"proof,omitempty"` // HMAC of the challenge with the token
	Part    Part      `json:"part,omitzero"`
	Spec    load.Spec `json:"spec,omitzero"`
	Session int       `json:"session,omitempty"`
}

type response struct {
	Error       string         `json:"error,omitempty"`
	Unavailable bool           `json:"unavailable,omitempty"`
	Protocol    int            `json:"protocol,omitempty"`
	Challenge   string         `json:"challenge,omitempty"`
	Machine     string         `json:"machine,omitempty"`
	Boot        string         `json:"boot,omitempty"` // the kernel's boot ID
	Link        string         `json:"link,omitempty"`
	Session     int            `json:"session,omitempty"`
	At          netip.AddrPort `json:"at,omitzero"`
	Reading     load.Reading   `json:"reading,omitzero"`
	Cost        cost           `json:"cost,omitzero"`
}

// Server lets clients measure against this host, one at a time.
type Server struct {
	Self string // path of this program
	// Token is the secret that clients must know. It is not sent: the client proves
	// that it knows it by an HMAC of a challenge. If it is empty, anyone who can reach
	// the listener can start datapaths and receive traffic here.
	Token string
	Log   *slog.Logger
}

const (
	// greetingTime is how long a client has to prove that it knows the token.
	greetingTime = 5 * time.Second
	// idleTime is how long after its last request a client is disconnected. A client
	// sends a ping at every pingEvery.
	idleTime  = time.Minute
	pingEvery = 15 * time.Second
	// mostGreetings limits the clients that have not proved it yet.
	mostGreetings = 16
)

// NewToken returns a random token.
func NewToken() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return hex.EncodeToString(b)
}

// proof returns the answer to a challenge.
func proof(token, challenge string) string {
	h := hmac.New(sha256.New, []byte(token))
	h.Write([]byte(challenge))
	return hex.EncodeToString(h.Sum(nil))
}

// Serve serves clients until ctx ends. Idle connections do not block other clients.
func (s Server) Serve(ctx context.Context, l net.Listener) error {
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	var clients sync.WaitGroup
	defer clients.Wait()
	greetings := make(chan struct{}, mostGreetings)
	var measuring sync.Mutex
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case greetings <- struct{}{}:
		default:
			_ = c.Close() // too many unproved clients
			continue
		}
		clients.Go(func() {
			defer c.Close()
			defer context.AfterFunc(ctx, func() { _ = c.Close() })()
			log := s.Log.With("address", c.RemoteAddr().String())
			in, out := json.NewDecoder(c), json.NewEncoder(c)
			err := s.greet(c, in, out)
			<-greetings
			if err != nil {
				log.Warn("client refused", "reason", err)
				return
			}
			if !measuring.TryLock() {
				_ = out.Encode(response{Error: "another client is measuring: try again later"})
				log.Warn("client refused", "reason", "another client is measuring")
				return
			}
			defer measuring.Unlock()
			if err := out.Encode(response{Protocol: protocol}); err != nil {
				return
			}
			log.Info("client connected")
			err = s.serveOne(ctx, c, in, out)
			log.Info("client disconnected", "reason", fmt.Sprint(err))
		})
	}
}

// greet sends a challenge and checks the client's proof.
func (s Server) greet(c net.Conn, in *json.Decoder, out *json.Encoder) error {
	_ = c.SetDeadline(time.Now().Add(greetingTime))
	defer func() { _ = c.SetDeadline(time.Time{}) }()
	challenge := NewToken()
	if err := out.Encode(response{Protocol: protocol, Challenge: challenge}); err != nil {
		return err
	}
	var q request
	if err := in.Decode(&q); err != nil {
		return err
	}
	if s.Token != "" && !hmac.Equal([]byte(q.Proof), []byte(proof(s.Token, challenge))) {
		_ = out.Encode(response{Error: "wrong token: use the --token that the server printed"})
		return errors.New("wrong token")
	}
	return nil
}

// served is the server's state for one client.
type served struct {
	self     string
	sessions map[int]load.Session
	last     int
	daemons  map[string][]daemon // by datapath
}

func (s Server) serveOne(ctx context.Context, c net.Conn, in *json.Decoder, out *json.Encoder) error {
	one := &served{self: s.Self, sessions: map[int]load.Session{}, daemons: map[string][]daemon{}}
	defer one.close()
	defer load.Quiet(mostStreams)()
	for {
		_ = c.SetReadDeadline(time.Now().Add(idleTime))
		var q request
		if err := in.Decode(&q); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		a, err := one.answer(ctx, c, q)
		if err != nil {
			a = response{Error: oneLine(err), Unavailable: errors.Is(err, ErrUnavailable)}
		}
		if err := out.Encode(a); err != nil {
			return err
		}
	}
}

func (s *served) close() {
	for _, x := range s.sessions {
		_ = x.Close()
	}
	for _, d := range s.daemons {
		_ = stopAll(d)
	}
}

func (s *served) answer(ctx context.Context, c net.Conn, q request) (response, error) {
	switch q.Do {
	case "ping":
		return response{}, nil
	case "hello":
		u, err := host.FindUnderlay(host.UnderlaySelector{Interfaces: []string{addrOf(c.LocalAddr()).String()}}, host.UnderlayContext{})
		if err != nil {
			return response{}, err
		}
		m := thisMachine()
		return response{Protocol: protocol, Boot: bootID(), Machine: fmt.Sprintf("Linux %s, %d x %s", m.Kernel, m.CPUs, m.CPU), Link: u.Name}, nil
	case "start":
		one := &site{datapath: q.Part.entry()}
		if err := one.startHere(ctx, q.Part, s.self); err != nil {
			return response{}, err
		}
		s.daemons[q.Part.Datapath] = one.daemons
		return response{}, nil
	case "stop":
		err := stopAll(s.daemons[q.Part.Datapath])
		delete(s.daemons, q.Part.Datapath)
		return response{}, err
	case "open":
		x, err := load.Local{Place: load.Here{}}.Open(ctx, q.Spec)
		if err != nil {
			return response{}, err
		}
		s.last++
		s.sessions[s.last] = x
		return response{Session: s.last, At: x.Addr()}, nil
	case "read", "close":
		x := s.sessions[q.Session]
		if x == nil {
			return response{}, fmt.Errorf("no session %d", q.Session)
		}
		if q.Do == "close" {
			delete(s.sessions, q.Session)
			return response{}, x.Close()
		}
		r, err := x.Reading()
		return response{Reading: r}, err
	case "cost":
		all, err := costHere(ctx, s.daemons[q.Part.Datapath])
		return response{Cost: all}, err
	}
	return response{}, fmt.Errorf("unknown request %q: the client has another version", q.Do)
}

// entry returns the datapath that the part belongs to.
func (p Part) entry() Datapath {
	if d, ok := FindDatapath(p.Datapath); ok {
		return d
	}
	return Datapath{Name: p.Datapath}
}

func addrOf(a net.Addr) netip.Addr { return a.(*net.TCPAddr).AddrPort().Addr().Unmap() }

// Remote is a client's connection to a server.
type Remote struct {
	// Machine describes the server's.
	Machine string

	conn  net.Conn
	mu    sync.Mutex
	in    *json.Decoder
	out   *json.Encoder
	here  netip.Addr // the client's address
	there netip.Addr // the server's address
	link  [2]string  // names of the underlay's links: client's, server's
	stop  context.CancelFunc
	same  bool // both ends are on one machine: count its CPU time once
}

// Connect connects to a server. The address may have a port; the default is
// DefaultPort. The token is the one that the server printed.
func Connect(ctx context.Context, to, token string) (*Remote, error) {
	r, err := introduce(ctx, to, token)
	if err != nil {
		return nil, err
	}
	hello, err := r.ask(ctx, request{Do: "hello"})
	if err == nil && hello.Protocol != protocol {
		err = fmt.Errorf("the server has protocol version %d, this program %d: use the same version of culvert on both hosts", hello.Protocol, protocol)
	}
	var u host.Underlay
	if err == nil {
		u, err = host.FindUnderlay(host.UnderlaySelector{Interfaces: []string{r.here.String()}}, host.UnderlayContext{})
	}
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	r.same = hello.Boot == bootID()
	r.Machine, r.link = hello.Machine, [2]string{u.Name, hello.Link}
	return r, nil
}

// introduce connects to the server and proves that it knows the token.
func introduce(ctx context.Context, to, token string) (*Remote, error) {
	at, err := serverAddress(to)
	if err != nil {
		return nil, err
	}
	d := net.Dialer{Timeout: 5 * time.Second}
	c, err := d.DialContext(ctx, "tcp", at.String())
	if err != nil {
		return nil, fmt.Errorf("cannot connect to the server (start it with `culvert bench --underlay existing --server`): %w", err)
	}
	r := &Remote{conn: c, in: json.NewDecoder(c), out: json.NewEncoder(c), here: addrOf(c.LocalAddr()), there: addrOf(c.RemoteAddr())}
	if err := r.prove(token); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	var alive context.Context
	alive, r.stop = context.WithCancel(context.WithoutCancel(ctx))
	go r.stayAlive(alive)
	return r, nil
}

// prove answers the server's challenge.
func (r *Remote) prove(token string) error {
	_ = r.conn.SetDeadline(time.Now().Add(2 * greetingTime))
	for range 2 { // the challenge, then the answer to the proof
		var a response
		if err := r.in.Decode(&a); err != nil {
			return fmt.Errorf("waiting for the server's challenge: %w", err)
		}
		switch {
		case a.Error != "":
			return fmt.Errorf("the server: %s", a.Error)
		case a.Protocol != protocol:
			return fmt.Errorf("the server has protocol version %d, this program %d: use the same version of culvert on both hosts", a.Protocol, protocol)
		case a.Challenge != "":
			if err := r.out.Encode(request{Do: "proof", Proof: proof(token, a.Challenge)}); err != nil {
				return fmt.Errorf("answering the server's challenge: %w", err)
			}
		}
	}
	return nil
}

// stayAlive sends pings until ctx ends, so that the server does not disconnect this
// client during a long measurement.
func (r *Remote) stayAlive(ctx context.Context) {
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if _, err := r.ask(ctx, request{Do: "ping"}); err != nil {
				return // the next request gets the error too
			}
		}
	}
}

func bootID() string {
	text, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return string(text)
}

func serverAddress(to string) (netip.AddrPort, error) {
	if a, err := netip.ParseAddr(to); err == nil {
		return netip.AddrPortFrom(a, DefaultPort), nil
	}
	at, err := netip.ParseAddrPort(to)
	if err != nil {
		return at, fmt.Errorf("%q is not an IP address such as 192.0.2.1 or 192.0.2.1:%d", to, DefaultPort)
	}
	return at, nil
}

// Close closes the connection; the server then stops what it started for it.
func (r *Remote) Close() error {
	r.stop()
	return r.conn.Close()
}

func (r *Remote) ask(ctx context.Context, q request) (response, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	deadline := time.Now().Add(startTime + 5*time.Second)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	_ = r.conn.SetDeadline(deadline)
	var a response
	err := r.out.Encode(q)
	if err == nil {
		err = r.in.Decode(&a)
	}
	switch {
	case err != nil:
		return a, fmt.Errorf("sending a request to the server: %w", err)
	case a.Unavailable:
		return a, unavailable(a.Error)
	case a.Error != "":
		return a, fmt.Errorf("the server: %s", a.Error)
	}
	return a, nil
}

// Open implements load.End.
func (r *Remote) Open(ctx context.Context, spec load.Spec) (load.Session, error) {
	a, err := r.ask(ctx, request{Do: "open", Spec: spec})
	return &remoteSession{r, a.Session, a.At}, err
}

type remoteSession struct {
	remote *Remote
	id     int
	at     netip.AddrPort
}

func (s *remoteSession) Addr() netip.AddrPort { return s.at }

func (s *remoteSession) Reading() (load.Reading, error) {
	a, err := s.remote.ask(context.Background(), request{Do: "read", Session: s.id})
	return a.Reading, err
}

func (s *remoteSession) Close() error {
	_, err := s.remote.ask(context.Background(), request{Do: "close", Session: s.id})
	return err
}

// startExisting starts both parts of a datapath, on this host and on the server's, in
// the hosts' own network namespaces.
func startExisting(ctx context.Context, d Datapath, r *Remote, self string) (_ *site, err error) {
	s := &site{underlay: Existing, datapath: d, near: []load.Place{load.Here{}}, far: r, to: r.there}
	s.farCost = func(ctx context.Context) (cost, error) {
		a, err := r.ask(ctx, request{Do: "cost", Part: Part{Datapath: d.Name}})
		if r.same {
			a.Cost.Machine = CPUTime{}
		}
		return a.Cost, err
	}
	s.close = func() error {
		_, err := r.ask(context.Background(), request{Do: "stop", Part: Part{Datapath: d.Name}})
		return errors.Join(stopAll(s.daemons), err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	s.offloads = features(r.link[0])
	switch {
	case d.Program != nil:
		return s, unavailable("other programs can be measured only in a lab")
	case d.fast != "" || d.auto:
		return s, unavailable("culvert's daemon can be measured only in a lab")
	case d.base() != d.Name:
		return s, unavailable("further instances can be measured only in a lab")
	case !d.none:
		p := Part{Datapath: d.Name, Slot: slices.Index(datapathNames(), d.Name), Underlay: []netip.Addr{r.there, r.here}}
		p.Port = tunnelPort + uint16(p.Slot)
		there, here := p, p
		there.Link, here.Link = r.link[1], r.link[0]
		here.Index = 1
		if _, err := r.ask(ctx, request{Do: "start", Part: there}); err != nil {
			return s, err
		}
		if err := s.startHere(ctx, here, self); err != nil {
			return s, err
		}
		s.to = there.self().subnet.Addr()
	}
	return s, s.reach(ctx)
}

// startHere starts a part in the network namespace of this process.
func (s *site) startHere(ctx context.Context, part Part, self string) error {
	dir, err := os.MkdirTemp("", "culvert-bench-")
	if err != nil {
		return err
	}
	part.RunDir = dir
	args, err := nodeArgs(part)
	if err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	p, err := startHostProcess(self, args, dir)
	if err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	s.add(p, dir)
	if err := s.ready(ctx); err != nil {
		return errors.Join(err, p.Stop())
	}
	if s.datapath.kernel {
		// It handles no packets, and removes its device when it is stopped.
		s.daemons = append(s.daemons, daemon{process: p, idle: true})
	}
	return nil
}

func stopAll(daemons []daemon) error {
	var errs []error
	for _, d := range daemons {
		errs = append(errs, d.process.Stop())
	}
	return errors.Join(errs...)
}

// features returns a link's features by ethtool's names; nil if they cannot be read.
func features(link string) map[string]bool {
	e, err := ethtool.NewEthtool()
	if err != nil {
		return nil
	}
	defer e.Close()
	on, err := e.Features(link)
	if err != nil {
		return nil
	}
	return on
}
