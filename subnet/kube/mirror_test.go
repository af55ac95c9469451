package kube

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"culvert/subnet"
)

// registryOf returns a registry of the Node self, which has sent nothing to the server.
func registryOf(t *testing.T, server, kubeconfig string) *Registry {
	t.Helper()
	r, err := New(Options{Server: server, Kubeconfig: kubeconfig, Node: "self", NetConf: "net-conf.json", Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// self is our lease.
var self = subnet.Lease{Node: "self", Backend: "host-gw", Endpoints: []subnet.Endpoint{{Subnet: netip.MustParsePrefix("10.244.1.0/24"), Public: netip.MustParseAddr("192.0.2.1")}}}

// nodeFacts returns the facts of the n-th Node, which runs flannel with host-gw.
func nodeFacts(n int, change ...func(*facts)) facts {
	f := facts{
		uid: fmt.Sprintf("uid-%d", n), created: int64(n), revision: int64(100 + n), managed: true, fromSpec: true,
		cidrs: []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", n))},
		notes: notes{backend: "host-gw", public: fmt.Sprintf("192.0.2.%d", n)},
	}
	for _, c := range change {
		c(&f)
	}
	return f
}

// TestMirror plays lists and events of Nodes, and states what each makes a consumer see: the
// peers of a new snapshot, or nothing; and whether Hold must verify our own Node.
func TestMirror(t *testing.T) {
	r := registryOf(t, "http://127.0.0.1:1", "")
	r.setHeld(self)
	m := newMirror(r, self)
	three := func() map[string]facts {
		return map[string]facts{"self": nodeFacts(1), "a": nodeFacts(2), "b": nodeFacts(3), "bare": nodeFacts(4, func(f *facts) { f.managed = false })}
	}
	const nothing = "nothing"
	orphaned := self
	orphaned.Expires = time.Now()
	for _, step := range []struct {
		name   string
		do     func()
		peers  string // subnets, or nothing
		verify bool
	}{
		{"the configuration before the list", func() { m.configure([]byte(hostgw4), nil) }, nothing, false},
		{"the list", func() { m.replace(three(), "10") }, "10.244.2.0/24 10.244.3.0/24", true},
		{"the same configuration", func() { m.configure([]byte(hostgw4), nil) }, nothing, false},
		{"a heartbeat", func() { m.change("a", nodeFacts(2, func(f *facts) { f.revision = 200 }), false) }, nothing, false},
		{"another address", func() { m.change("a", nodeFacts(2, func(f *facts) { f.notes.public = "192.0.2.22" }), false) }, "10.244.2.0/24 10.244.3.0/24", false},
		{"another podCIDR", func() { m.change("a", nodeFacts(5), false) }, "10.244.3.0/24 10.244.5.0/24", false},
		{"a malformed Node", func() { m.change("a", nodeFacts(5, func(f *facts) { f.notes.backend = "" }), false) }, "10.244.3.0/24", false},
		{"and repaired", func() { m.change("a", nodeFacts(5), false) }, "10.244.3.0/24 10.244.5.0/24", false},
		{"no longer managed", func() { m.change("a", nodeFacts(5, func(f *facts) { f.managed = false }), false) }, "10.244.3.0/24", false},
		{"an unknown Node is deleted", func() { m.change("c", facts{}, true) }, nothing, false},
		{"a peer is deleted", func() { m.change("b", facts{}, true) }, "", false},
		{"our Node changes", func() { m.change("self", nodeFacts(1, func(f *facts) { f.uid = "new" }), false) }, nothing, true},
		{"our Node, unchanged", func() { m.change("self", nodeFacts(1, func(f *facts) { f.uid = "new"; f.revision = 300 }), false) }, nothing, false},
		{"our Node is deleted", func() { m.change("self", facts{}, true) }, nothing, true},
		{"another Node gets our podCIDR meanwhile", func() {
			r.setHeld(orphaned)
			m.take() // setHeld publishes the changed lease
			m.change("thief", nodeFacts(1, func(f *facts) { f.uid = "thief" }), false)
		}, "", true},
		{"a list of a later state", func() { r.setHeld(self); m.take(); m.replace(three(), "20") }, "10.244.2.0/24 10.244.3.0/24", true},
		{"the same list", func() { m.replace(three(), "21") }, "10.244.2.0/24 10.244.3.0/24", false},
		{"a list of an earlier state keeps the peers", func() { m.replace(map[string]facts{"self": nodeFacts(1)}, "5") }, "10.244.2.0/24 10.244.3.0/24", false},
		{"one comes back with another podCIDR", func() { m.change("b", nodeFacts(6), false) }, "10.244.2.0/24 10.244.6.0/24", false},
		{"the others are removed after the settle time", m.settle, "10.244.6.0/24", false},
	} {
		step.do()
		s, fresh, err := m.take()
		got := nothing
		if fresh {
			var subnets []string
			for _, p := range s.Peers {
				subnets = append(subnets, p.Subnets()[0].String())
			}
			slices.Sort(subnets)
			got = strings.Join(subnets, " ")
		}
		if got != step.peers || err != nil {
			t.Errorf("%s: %q, %v, want %q", step.name, got, err, step.peers)
		}
		verify := false
		select {
		case <-r.verifyNow:
			verify = true
		default:
		}
		if verify != step.verify {
			t.Errorf("%s: Hold verifies: %t", step.name, verify)
		}
	}
	if m.unsettled() {
		t.Error("peers are still kept after the settle time")
	}
}

// TestMirrorConfiguration states which configurations a running node applies.
func TestMirrorConfiguration(t *testing.T) {
	r := registryOf(t, "http://127.0.0.1:1", "")
	m := newMirror(r, self)
	m.replace(map[string]facts{}, "10")
	for _, step := range []struct {
		text    string
		err     error
		refused string // part of it
		network string
		fresh   bool
	}{
		{hostgw4, nil, "", "10.244.0.0/16", true},
		{`{"Network":"10.244.0.0/15","Backend":{"Type":"host-gw"}}`, nil, "", "10.244.0.0/15", true},
		{`{"Network":"10.9.0.0/16","Backend":{"Type":"host-gw"}}`, nil, "our subnet 10.244.1.0/24 would be outside", "10.244.0.0/15", true},
		{vxlan4, nil, "the backend would change", "10.244.0.0/15", true},
		{`{`, nil, "not JSON", "10.244.0.0/15", true},
		{"", os.ErrNotExist, "file does not exist", "10.244.0.0/15", true},
		{"", os.ErrNotExist, "file does not exist", "10.244.0.0/15", false},
		{hostgw4, nil, "", "10.244.0.0/16", true},
	} {
		m.configure([]byte(step.text), step.err)
		s, fresh, _ := m.take()
		if fresh != step.fresh {
			t.Errorf("%s: published: %t", step.text, fresh)
		}
		if fresh && (s.Config.Networks[0].Prefix.String() != step.network || !strings.Contains(s.ConfigRefused, step.refused) || (s.ConfigRefused == "") != (step.refused == "")) {
			t.Errorf("%s: network %s, refused %q", step.text, s.Config.Networks[0].Prefix, s.ConfigRefused)
		}
	}
}

// TestMirrorOutage states what a consumer sees of a failure and of the next contact.
func TestMirrorOutage(t *testing.T) {
	r := registryOf(t, "http://127.0.0.1:1", "")
	m := newMirror(r, self)
	m.configure([]byte(hostgw4), nil)
	m.replace(map[string]facts{"a": nodeFacts(2)}, "10")
	m.take()
	lost := errors.New("lost")
	m.contact()
	if _, fresh, _ := m.take(); fresh {
		t.Error("a contact without an outage is published")
	}
	m.fail(lost)
	if _, fresh, err := m.take(); fresh || !errors.Is(err, lost) {
		t.Errorf("after a failure: %t, %v", fresh, err)
	}
	if _, fresh, err := m.take(); fresh || err != nil {
		t.Errorf("the failure again: %t, %v", fresh, err)
	}
	m.contact()
	if s, fresh, err := m.take(); !fresh || err != nil || len(s.Peers) != 1 {
		t.Errorf("after the contact: %+v, %t, %v", s, fresh, err)
	}
}

// apiServer answers as the API server would, with what a test states.
func apiServer(t *testing.T, handle func(w http.ResponseWriter, r *http.Request)) *Registry {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(handle))
	t.Cleanup(s.Close)
	dir := t.TempDir()
	token, config := filepath.Join(dir, "token"), filepath.Join(dir, "kubeconfig")
	text := fmt.Sprintf(`{"current-context":"c","contexts":[{"name":"c","context":{"cluster":"k","user":"u"}}],"clusters":[{"name":"k","cluster":{"server":%q}}],"users":[{"name":"u","user":{"tokenFile":%q}}]}`, s.URL, token)
	if err := errors.Join(os.WriteFile(token, []byte("old\n"), 0o600), os.WriteFile(config, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
	return registryOf(t, "", config)
}

// TestRejectedTokenIsReadAgain has the kubelet renew the token before the client has noticed:
// after a 401 the file is read again, once.
func TestRejectedTokenIsReadAgain(t *testing.T) {
	var got []string
	r := apiServer(t, func(w http.ResponseWriter, q *http.Request) {
		got = append(got, strings.TrimPrefix(q.Header.Get("Authorization"), "Bearer "))
		if got[len(got)-1] != "new" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_, _ = w.Write([]byte(`{"metadata":{"name":"self","uid":"u"}}`))
	})
	if _, err := r.c.node(t.Context(), "self", ""); !has(err, http.StatusUnauthorized) || !strings.Contains(err.Error(), "service account exists") {
		t.Errorf("with the old token: %v", err)
	}
	if want := []string{"old", "old"}; !slices.Equal(got, want) {
		t.Errorf("tokens sent: %q", got)
	}
	if err := os.WriteFile(r.c.access.tokenFile, []byte("new\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got = nil
	if o, err := r.c.node(t.Context(), "self", ""); err != nil || o.Metadata.UID != "u" {
		t.Errorf("with the new token: %+v, %v", o, err)
	}
	if want := []string{"old", "new"}; !slices.Equal(got, want) {
		t.Errorf("tokens sent: %q", got)
	}
}

// TestWatchStream decodes what a watch may receive, and states how each stream ends.
func TestWatchStream(t *testing.T) {
	const added = `{"type":"ADDED","object":{"metadata":{"name":"a","resourceVersion":"11"}}}` + "\n"
	for name, test := range map[string]struct {
		code   int
		header string // Retry-After
		body   string
		events string
		ends   error         // io.EOF, or any with code
		is     int           // HTTP status in the error
		after  time.Duration // retryAfter
	}{
		"the server ends it":        {200, "", added + added, "a a", io.EOF, 0, 0},
		"cut off within an event":   {200, "", added + added[:20], "a", io.EOF, 0, 0},
		"the revision is discarded": {200, "", added + `{"type":"ERROR","object":{"status":"Failure","code":410,"message":"too old"}}`, "a", nil, 410, 0},
		"throttled":                 {429, "7", `{"message":"slow down"}`, "", nil, 429, 7 * time.Second},
		"throttled for long":        {429, "4000", ``, "", nil, 429, time.Minute},
		"denied":                    {403, "", `{"message":"nodes is forbidden"}`, "", nil, 403, 0},
		"not JSON":                  {200, "", "<html>", "", nil, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			var query url.Values
			r := apiServer(t, func(w http.ResponseWriter, q *http.Request) {
				query = q.URL.Query()
				if test.header != "" {
					w.Header().Set("Retry-After", test.header)
				}
				w.WriteHeader(test.code)
				_, _ = w.Write([]byte(test.body))
			})
			var events []string
			began := false
			err := r.c.watch(t.Context(), "10", time.Minute, func() { began = true }, func(e *event) error {
				events = append(events, e.Object.Metadata.Name)
				return nil
			})
			if query.Get("resourceVersion") != "10" || query.Get("timeoutSeconds") != "60" || query.Get("watch") != "1" {
				t.Errorf("query %v", query)
			}
			if got := strings.Join(events, " "); got != test.events || began != (test.code == 200) {
				t.Errorf("events %q, began %t", got, began)
			}
			switch {
			case test.ends != nil && !errors.Is(err, test.ends), test.is != 0 && !has(err, test.is), err == nil, test.ends == nil && errors.Is(err, io.EOF), retryAfter(err) != test.after:
				t.Errorf("it ends with %v, retry after %s", err, retryAfter(err))
			}
		})
	}
}
