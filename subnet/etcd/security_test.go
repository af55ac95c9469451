package etcd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	nethttp "net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"culvert/internal/testca"
	"culvert/subnet/etcd/etcdtest"
	"culvert/subnet/etcd/member"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// reads returns the error of one read request.
func reads(t *testing.T, endpoint string, change func(*Options)) error {
	t.Helper()
	r := open(t, endpoint, func(o *Options) { o.RequestTimeout = 700 * time.Millisecond }, change)
	_, _, err := r.ConfigText(t.Context())
	return err
}

func TestTLS(t *testing.T) {
	t.Parallel()
	a, stranger := testca.New(t), testca.New(t)
	a.Issue(t, "server", a)
	a.Issue(t, "client", a)
	stranger.Issue(t, "client", stranger)
	withCA := func(o *Options) { o.CAFile = a.Path("ca.pem") }
	withClient := func(o *Options) {
		withCA(o)
		o.CertFile, o.KeyFile = a.Path("client.pem"), a.Path("client-key.pem")
	}

	t.Run("CA alone", func(t *testing.T) {
		t.Parallel()
		url := etcdtest.StartServer(t, member.Options{CertFile: a.Path("server.pem"), KeyFile: a.Path("server-key.pem")}).URL()
		if err := reads(t, url, withCA); err != nil {
			t.Errorf("with the CA: %v", err)
		}
		if err := reads(t, strings.TrimPrefix(url, "https://"), withCA); err != nil {
			t.Errorf("without a scheme: %v", err)
		}
		if err := reads(t, url, func(o *Options) { o.CAFile = stranger.Path("ca.pem") }); err == nil {
			t.Error("accepted a server of another CA")
		}
	})
	t.Run("client certificate", func(t *testing.T) {
		t.Parallel()
		url := etcdtest.StartServer(t, member.Options{
			CertFile: a.Path("server.pem"), KeyFile: a.Path("server-key.pem"), CAFile: a.Path("ca.pem"),
		}).URL()
		if err := reads(t, url, withClient); err != nil {
			t.Errorf("with a certificate: %v", err)
		}
		if err := reads(t, url, withCA); err == nil {
			t.Error("accepted without a client certificate")
		}
	})
	t.Run("renewed on disk", func(t *testing.T) {
		t.Parallel()
		server := etcdtest.StartServer(t, member.Options{
			CertFile: a.Path("server.pem"), KeyFile: a.Path("server-key.pem"), CAFile: a.Path("ca.pem"),
		})
		before := testca.New(t) // in another directory, since its files are replaced
		before.Issue(t, "client", before)
		// The files on disk are of another CA at first, as if they had expired.
		r := open(t, server.URL(), func(o *Options) {
			o.CAFile = before.Path("ca.pem")
			o.RequestTimeout = 700 * time.Millisecond
			o.CertFile, o.KeyFile = before.Path("client.pem"), before.Path("client-key.pem")
		})
		if _, _, err := r.ConfigText(t.Context()); err == nil {
			t.Fatal("a client of another CA was accepted")
		}
		for _, file := range []string{"ca.pem", "client.pem", "client-key.pem"} {
			content, err := os.ReadFile(a.Path(file))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(before.Path(file), content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "the renewed certificate", func() bool { _, _, err := r.ConfigText(t.Context()); return err == nil })
	})
}

func TestUserAndPassword(t *testing.T) {
	t.Parallel()
	server := etcdtest.StartServer(t, member.Options{})
	etcdtest.Secure(t, server.URL())
	log := &lines{}
	asUser := func(o *Options) { o.User, o.Password, o.Quarantine = "culvert", etcdtest.Password, time.Minute }
	// All operations on a lease must work with access to only this prefix.
	r, l, w := ready(t, server.URL(), log.options, asUser)
	lost := hold(t, r, l)
	other := open(t, server.URL(), asUser)
	l2 := acquire(t, other, claim(t, vxlanConfig, 2))
	eventually(t, "the peer", func() bool { return len(w.last().Peers) == 1 })
	if err := other.Release(t.Context(), l2); err != nil {
		t.Error(err)
	}
	if _, err := r.Update(t.Context(), movedTo(l, "192.0.2.9")); err != nil {
		t.Error(err)
	}
	stands(t, r, l, lost)

	// A restart of etcd invalidates the token.
	server.Stop()
	server.Start()
	put(t, r, "subnets/10.5.1.0-24", peerValue(1))
	eventually(t, "a peer after the restart", func() bool { return len(w.last().Peers) == 1 })

	for name, o := range map[string]Options{
		"wrong password": {User: "culvert", Password: "x"},
		"unknown user":   {User: "nobody", Password: "x"},
	} {
		o.Endpoints, o.Logger = []string{server.URL()}, slog.New(slog.DiscardHandler)
		r, err := New(o)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Config(t.Context()); err == nil || r.Answers(t.Context()) != nil {
			t.Errorf("%s: %v", name, err)
		}
		_ = r.Close()
	}
	if _, err := open(t, server.URL()).Config(t.Context()); err == nil {
		t.Error("read without a user")
	}
	if _, err := open(t, server.URL(), asUser, at(t, "/elsewhere")).Acquire(t.Context(), claim(t, vxlanConfig, 3)); err == nil {
		t.Error("wrote outside the role's prefix")
	}
	if strings.Contains(log.String(), etcdtest.Password) {
		t.Error("the password is in the log")
	}
	if log.count("is sent unencrypted") != 1 {
		t.Error("no warning about a password over http")
	}
}

func TestPasswordIsNotShown(t *testing.T) {
	t.Parallel()
	o := Options{Endpoints: []string{"a"}, User: "culvert", Password: etcdtest.Password}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "options", o, "pointer", &o)
	encoded, err := json.Marshal(o)
	shown := fmt.Sprintf("%v %+v %#v %s %v", o, o, o, o, &o) + log.String() + string(encoded)
	if err == nil && strings.Contains(shown, etcdtest.Password) || !strings.Contains(shown, "(hidden)") {
		t.Error(shown)
	}
}

func TestOptions(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(*Options)
		fault  string
	}{
		"no endpoint":         {func(o *Options) { o.Endpoints = nil }, "no endpoint"},
		"no logger":           {func(o *Options) { o.Logger = nil }, "no logger"},
		"key without cert":    {func(o *Options) { o.KeyFile = "x" }, "must be set together"},
		"user alone":          {func(o *Options) { o.User = "x" }, "must be set together"},
		"password alone":      {func(o *Options) { o.Password = "x" }, "must be set together"},
		"a path":              {func(o *Options) { o.Endpoints = []string{"http://a:2379/x"} }, "not a URL"},
		"a user in the URL":   {func(o *Options) { o.Endpoints = []string{"http://u:" + etcdtest.Password + "@a:2379"} }, "contains a user"},
		"another scheme":      {func(o *Options) { o.Endpoints = []string{"ftp://a"} }, "neither http nor https"},
		"http with a CA":      {func(o *Options) { o.Endpoints, o.CAFile = []string{"http://a"}, "x" }, "write https://"},
		"both schemes":        {func(o *Options) { o.Endpoints = []string{"http://a", "https://b"} }, "use https for all"},
		"a missing CA":        {func(o *Options) { o.CAFile = "/nonexistent" }, "read the CA"},
		"not a PEM file":      {func(o *Options) { o.CAFile = "/dev/null" }, "no PEM certificate"},
		"a missing key pair":  {func(o *Options) { o.CertFile, o.KeyFile = "/nonexistent", "/nonexistent" }, "client certificate"},
		"nothing but a colon": {func(o *Options) { o.Endpoints = []string{":"} }, "not a URL"},
	} {
		o := Options{Endpoints: []string{"a"}, Logger: slog.New(slog.DiscardHandler)}
		c.change(&o)
		_, err := New(o)
		if err == nil || !strings.Contains(err.Error(), c.fault) || strings.Contains(err.Error(), etcdtest.Password) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for in, want := range map[string]string{
		"10.0.0.1": "http://10.0.0.1:2379", "10.0.0.1:4001": "http://10.0.0.1:4001", "https://etcd.example": "https://etcd.example:2379",
		"[fd00::1]:2379": "http://[fd00::1]:2379", "http://a:1/": "http://a:1",
	} {
		if got, err := completeEndpoint(in, false); err != nil || got != want {
			t.Errorf("%s became %s, %v", in, got, err)
		}
	}
}

// Config waits if etcd is unreachable when the daemon starts, with and without a
// user.
func TestEtcdUnreachableAtStart(t *testing.T) {
	t.Parallel()
	server := etcdtest.StartServer(t, member.Options{})
	setConfig(t, open(t, server.URL()), vxlanConfig)
	etcdtest.Secure(t, server.URL())
	server.Stop()
	got := make(chan error, 1)
	go func() {
		o := Options{Endpoints: []string{server.URL()}, User: "culvert", Password: etcdtest.Password, Logger: slog.New(slog.DiscardHandler), DialTimeout: time.Second}
		r, err := New(o)
		if err == nil {
			_, err = r.Config(t.Context())
			_ = r.Close()
		}
		got <- err
	}()
	time.Sleep(300 * time.Millisecond)
	server.Start()
	if err := <-got; err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	server.Stop()
	if _, err := open(t, "127.0.0.1:1").Config(ctx); err == nil {
		t.Error("Config returned without a server")
	}
	if _, err := open(t, "127.0.0.1:1").Acquire(ctx, claim(t, vxlanConfig, 1)); err == nil {
		t.Error("Acquire returned without a server")
	}
}

// Explain says within 1.5 s and on one line why a server cannot be used.
func TestTroubleNamesTheCause(t *testing.T) {
	t.Parallel()
	a, stranger := testca.New(t), testca.New(t)
	a.Issue(t, "server", a)
	plain := etcdtest.StartServer(t, member.Options{})
	secured := etcdtest.StartServer(t, member.Options{CertFile: a.Path("server.pem"), KeyFile: a.Path("server-key.pem")})
	demanding := etcdtest.StartServer(t, member.Options{CertFile: a.Path("server.pem"), KeyFile: a.Path("server-key.pem"), CAFile: a.Path("ca.pem")})
	http := httptest.NewServer(nethttp.NotFoundHandler())
	defer http.Close()
	swap := func(url, scheme string) string { _, host, _ := strings.Cut(url, "://"); return scheme + "://" + host }
	etcdtest.Secure(t, plain.URL())
	for name, c := range map[string]struct {
		url    string
		change func(*Options)
		says   string
	}{
		"wrong CA":              {secured.URL(), func(o *Options) { o.CAFile = stranger.Path("ca.pem") }, "not signed by the CA in " + stranger.Path("ca.pem")},
		"no CA":                 {secured.URL(), func(*Options) {}, "set the CA with --etcd-cafile"},
		"http to https":         {swap(secured.URL(), "http"), func(*Options) {}, "it requires TLS: write https://"},
		"https to http":         {swap(plain.URL(), "https"), func(o *Options) { o.CAFile = a.Path("ca.pem") }, "it does not use TLS: write http://"},
		"no client certificate": {demanding.URL(), func(o *Options) { o.CAFile = a.Path("ca.pem") }, "that it accepts with --etcd-certfile"},
		"another name":          {strings.Replace(secured.URL(), "127.0.0.1", "localhost", 1), func(o *Options) { o.CAFile = a.Path("ca.pem") }, "use an address that is in the certificate"},
		"a web server":          {http.URL, func(*Options) {}, "is this etcd's client port?"},
		"nobody":                {"http://127.0.0.1:1", func(*Options) {}, "connection refused: is etcd running there"},
		"wrong password":        {plain.URL(), func(o *Options) { o.User, o.Password = "culvert", "wrong" }, "set the right ones with --etcd-username"},
		"another prefix":        {plain.URL(), func(o *Options) { o.User, o.Password, o.Prefix = "culvert", etcdtest.Password, "/elsewhere" }, "grant its role readwrite on the prefix /elsewhere/"},
		"no user":               {plain.URL(), func(*Options) {}, "requires authentication: set a user"},
	} {
		t.Run(name, func(t *testing.T) {
			r := open(t, c.url, func(o *Options) { o.FailFast = true }, c.change)
			began := time.Now()
			_, _, err := r.ConfigText(t.Context())
			if err = r.Explain(t.Context(), err); err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v", err)
			}
			if took := time.Since(began); took > 1500*time.Millisecond {
				t.Errorf("took %s", took)
			}
		})
	}
	t.Run("an answer", func(t *testing.T) {
		r := open(t, plain.URL(), func(o *Options) { o.User, o.Password = "culvert", etcdtest.Password })
		if _, _, err := r.ConfigText(t.Context()); err != nil || r.Trouble() != nil {
			t.Error(err, r.Trouble())
		}
	})
}

// The password file is read again when etcd rejects the password.
func TestPasswordFileChanges(t *testing.T) {
	t.Parallel()
	server := etcdtest.StartServer(t, member.Options{})
	etcdtest.Secure(t, server.URL())
	file := filepath.Join(t.TempDir(), "password")
	set := func(text string) {
		if err := os.WriteFile(file, []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	set(etcdtest.Password)
	r, l, w := ready(t, server.URL(), func(o *Options) { o.User, o.PasswordFile = "culvert", file })
	lost := hold(t, r, l)
	root, err := clientv3.New(clientv3.Config{Endpoints: []string{server.URL()}, Username: "root", Password: "root"})
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if _, err := root.UserChangePassword(t.Context(), "culvert", "another"); err != nil {
		t.Fatal(err)
	}
	// After the restart, requests use the old password until the file changes.
	server.Stop()
	server.Start()
	if _, _, err := r.ConfigText(t.Context()); err == nil {
		t.Error("the old password is still accepted")
	}
	set("another")
	put(t, r, "subnets/10.5.1.0-24", peerValue(1))
	eventually(t, "a peer after the change", func() bool { return len(w.last().Peers) == 1 })
	stands(t, r, l, lost)
}

func TestEndpointsWithBlanks(t *testing.T) {
	t.Parallel()
	o, err := Options{Endpoints: strings.Split(" http://10.0.0.1:2379, http://10.0.0.2:2379 ,,", ","), Logger: slog.New(slog.DiscardHandler)}.complete()
	if want := []string{"http://10.0.0.1:2379", "http://10.0.0.2:2379"}; err != nil || !slices.Equal(o.Endpoints, want) {
		t.Error(o.Endpoints, err)
	}
	if _, err := (Options{Endpoints: []string{" ", ""}, Logger: slog.New(slog.DiscardHandler)}).complete(); err == nil {
		t.Error("accepted blank endpoints")
	}
}
