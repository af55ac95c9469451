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

// authentication adds etcd's token to requests and gets a new one when etcd
// rejects it. It replaces the client's own authentication for three reasons:
//
//   - The client sends its old token with Authenticate too. etcd before 3.5
//     checks it there (v3_server.go, processInternalRaftRequestOnce), so that a
//     client with an invalid token can never get a new one.
//   - clientv3.New returns only after Authenticate was answered, so that a
//     daemon could not start while etcd is unreachable.
//   - The password file may change while the daemon runs.
type authentication struct {
	options    Options
	requesting chan struct{} // serializes Authenticate: each costs etcd a bcrypt

	mu    sync.Mutex
	token string
	asked time.Time // when etcd issued token; zero: no token. "" if etcd requires none
	// refused is the last password that etcd rejected, so that waiting requests
	// do not each try it again. Guarded by requesting.
	refused   string
	refusedAt time.Time
}

// refusedFor is how long a rejected password is not retried.
const refusedFor = time.Second

// tokenFresh is how long a new stream reuses a token.
const tokenFresh = 5 * time.Second

func newAuthentication(o Options) *authentication {
	return &authentication{options: o, requesting: make(chan struct{}, 1)}
}

// unary is the interceptor of unary requests.
func (a *authentication) unary(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if method == etcdserverpb.Auth_Authenticate_FullMethodName {
		return invoke(ctx, method, req, reply, conn, opts...)
	}
	token, err := a.get(ctx, conn)
	if err != nil {
		return err
	}
	err = invoke(withToken(ctx, token), method, req, reply, conn, opts...)
	if !tokenRejected(err) {
		return err
	}
	a.discard(token)
	if token, err = a.get(ctx, conn); err != nil {
		return err
	}
	return invoke(withToken(ctx, token), method, req, reply, conn, opts...)
}

// stream is the interceptor of streams. etcd rejects a token with a message on the
// stream, which is not visible here, so a stream uses a recent token.
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

// get returns the token; it requests one if there is none.
func (a *authentication) get(ctx context.Context, conn *grpc.ClientConn) (string, error) {
	if token, ok := a.cached(); ok {
		return token, nil
	}
	select {
	case a.requesting <- struct{}{}:
		defer func() { <-a.requesting }()
	case <-ctx.Done():
		return "", ctx.Err()
	}
	if token, ok := a.cached(); ok {
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

func (a *authentication) cached() (string, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.token, !a.asked.IsZero()
}

// discard drops the token if it has not been replaced.
func (a *authentication) discard(token string) {
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

// tokenRejected reports whether a new token may help. ErrUserEmpty is the answer to
// a request without a token.
func tokenRejected(err error) bool {
	err = rpctypes.Error(err)
	return errors.Is(err, rpctypes.ErrInvalidAuthToken) || errors.Is(err, rpctypes.ErrAuthOldRevision) || errors.Is(err, rpctypes.ErrUserEmpty)
}

// password returns the current password; a file is read on each call.
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
