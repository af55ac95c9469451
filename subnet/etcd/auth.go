package etcd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// authentication gives requests the token that etcd hands out for a user and a
// password, and asks for another when etcd refuses it. It takes the place of
// the client's own, for three reasons:
//
//   - The client sends its old token with Authenticate too. etcd before 3.5
//     checks it there (v3_server.go, processInternalRaftRequestOnce), so that a
//     client whose token is void can never get another.
//   - The client is made only once Authenticate has been answered, so that a
//     daemon could not start while etcd is unreachable.
//   - The password may change in its file while the daemon runs.
type authentication struct {
	options Options
	asking  chan struct{} // one Authenticate at a time: each costs etcd a bcrypt

	mu    sync.Mutex
	token string
	asked time.Time // when etcd gave it, "" if it asks for none; zero if there is none
	// refused is the password that etcd refused last, and when: it is not asked
	// again at once by each request that waits. Of who has asking.
	refused   string
	refusedAt time.Time
}

// refusedFor is how long a password that was refused is not tried again.
const refusedFor = time.Second

// tokenFresh is how long after a token was given a stream takes it for valid.
const tokenFresh = 5 * time.Second

func newAuthentication(o Options) *authentication {
	return &authentication{options: o, asking: make(chan struct{}, 1)}
}

// unary is the interceptor of requests.
func (a *authentication) unary(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if method == etcdserverpb.Auth_Authenticate_FullMethodName {
		return invoke(ctx, method, req, reply, conn, opts...)
	}
	token, err := a.get(ctx, conn)
	if err != nil {
		return err
	}
	err = invoke(withToken(ctx, token), method, req, reply, conn, opts...)
	if !refusesToken(err) {
		return err
	}
	a.void(token)
	if token, err = a.get(ctx, conn); err != nil {
		return err
	}
	return invoke(withToken(ctx, token), method, req, reply, conn, opts...)
}

// stream is the interceptor of streams. etcd refuses a token only by an answer
// on the stream, which is not seen here: so a stream begins with a new one.
func (a *authentication) stream(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	a.mu.Lock()
	if time.Since(a.asked) > tokenFresh {
		a.token, a.asked = "", time.Time{}
	}
	a.mu.Unlock()
	token, err := a.get(ctx, conn)
	if err != nil {
		return nil, err
	}
	return open(withToken(ctx, token), desc, conn, method, opts...)
}

// get returns the token, and asks for one if there is none.
func (a *authentication) get(ctx context.Context, conn *grpc.ClientConn) (string, error) {
	if token, ok := a.known(); ok {
		return token, nil
	}
	select {
	case a.asking <- struct{}{}:
		defer func() { <-a.asking }()
	case <-ctx.Done():
		return "", ctx.Err()
	}
	if token, ok := a.known(); ok {
		return token, nil
	}
	password, err := a.options.password()
	if err != nil {
		return "", err
	}
	if password == a.refused && time.Since(a.refusedAt) < refusedFor {
		return "", rpctypes.ErrAuthFailed
	}
	ctx, cancel := context.WithTimeout(ctx, a.options.RequestTimeout)
	defer cancel()
	answer, err := etcdserverpb.NewAuthClient(conn).Authenticate(ctx, &etcdserverpb.AuthenticateRequest{Name: a.options.User, Password: password}, grpc.WaitForReady(!a.options.FailFast))
	switch err = rpctypes.Error(err); {
	case errors.Is(err, rpctypes.ErrAuthNotEnabled):
		answer = &etcdserverpb.AuthenticateResponse{}
	case errors.Is(err, rpctypes.ErrAuthFailed):
		a.refused, a.refusedAt = password, time.Now()
		return "", err
	case err != nil:
		return "", err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.token, a.asked = answer.Token, time.Now()
	return a.token, nil
}

func (a *authentication) known() (string, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.token, !a.asked.IsZero()
}

// void forgets a token, unless it is another by now.
func (a *authentication) void(token string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.token == token {
		a.token, a.asked = "", time.Time{}
	}
}

func withToken(ctx context.Context, token string) context.Context {
	if token == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, rpctypes.TokenFieldNameGRPC, token)
}

// refusesToken says whether another token may help. ErrUserEmpty answers a
// request without one.
func refusesToken(err error) bool {
	err = rpctypes.Error(err)
	return errors.Is(err, rpctypes.ErrInvalidAuthToken) || errors.Is(err, rpctypes.ErrAuthOldRevision) || errors.Is(err, rpctypes.ErrUserEmpty)
}

// password returns the password as it is now: a file is read each time.
func (o Options) password() (string, error) {
	if o.PasswordFile == "" {
		return o.Password, nil
	}
	text, err := os.ReadFile(o.PasswordFile)
	if err != nil {
		return "", fmt.Errorf("etcd: read the password (--etcd-password-file): %w", err)
	}
	password := strings.TrimRight(string(text), "\r\n")
	if password == "" {
		return "", fmt.Errorf("etcd: %s (--etcd-password-file) is empty", o.PasswordFile)
	}
	return password, nil
}
