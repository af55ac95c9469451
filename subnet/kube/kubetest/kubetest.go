// Package kubetest runs a real kube-apiserver, with its own etcd, in a test. The
// programs are built by `make kubernetes`.
package kubetest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"culvert/subnet/etcd/etcdtest"
)

// Tokens that the API server accepts: an administrator's, the service account
// culvert's in the namespace culvert, and one without permissions.
const (
	AdminToken   = "admin-token"
	CulvertToken = "culvert-token"
	NobodyToken  = "nobody-token"
)

// Server is a kube-apiserver with RBAC.
type Server struct {
	t       testing.TB
	dir     string
	args    []string
	program string
	port    int
	http    *http.Client
	cmd     *exec.Cmd
	ended   chan struct{}
}

// Program returns the path of a Kubernetes program in the directory
// CULVERT_KUBERNETES. It fails the test if the program does not exist.
func Program(t testing.TB, name string) string {
	t.Helper()
	dir := os.Getenv("CULVERT_KUBERNETES")
	if dir == "" {
		t.Fatal("CULVERT_KUBERNETES, the directory of Kubernetes' programs, is not set: run `make test-kubernetes`")
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: `make kubernetes` builds it", err)
	}
	return path
}

// Start starts an API server that ends with the test, and waits until it is ready.
// If etcd is empty, it starts one; more are additional flags.
func Start(t testing.TB, etcd string, more ...string) *Server {
	t.Helper()
	s := &Server{t: t, dir: t.TempDir(), program: Program(t, "kube-apiserver")}
	if etcd == "" {
		etcd = etcdtest.Start(t)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.port = l.Addr().(*net.TCPAddr).Port
	_ = l.Close()
	s.args = append(Args(t, s.dir, etcd, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(s.port))), more...)
	t.Cleanup(s.Stop)
	s.Run()
	return s
}

// Args returns the flags of a kube-apiserver that serves at an address and has its
// files in dir.
func Args(t testing.TB, dir, etcd string, at netip.AddrPort) []string {
	t.Helper()
	key := filepath.Join(dir, "service-account.pem")
	writeKey(t, key)
	tokens := filepath.Join(dir, "tokens.csv")
	write(t, tokens, AdminToken+",admin,1,system:masters\n"+
		CulvertToken+`,system:serviceaccount:culvert:culvert,2,"system:serviceaccounts,system:serviceaccounts:culvert"`+"\n"+
		NobodyToken+",nobody,3\n")
	return []string{
		"--etcd-servers=" + etcd, "--bind-address=" + at.Addr().String(), "--advertise-address=" + at.Addr().String(), fmt.Sprintf("--secure-port=%d", at.Port()),
		"--cert-dir=" + dir, "--token-auth-file=" + tokens, "--authorization-mode=RBAC",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file=" + key, "--service-account-signing-key-file=" + key,
		"--service-cluster-ip-range=10.96.0.0/16", "--allow-privileged=true", "--endpoint-reconciler-type=none",
	}
}

// URL returns the server's URL.
func (s *Server) URL() string { return fmt.Sprintf("https://127.0.0.1:%d", s.port) }

// CAFile returns the file that the server's certificate is verified with.
func (s *Server) CAFile() string { return filepath.Join(s.dir, "apiserver.crt") }

// Run starts the server, also after Stop, and waits until it is ready.
func (s *Server) Run() {
	s.t.Helper()
	log, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	s.cmd = exec.Command(s.program, s.args...)
	s.cmd.Stdout, s.cmd.Stderr = log, log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.ended = make(chan struct{})
	go func(cmd *exec.Cmd, ended chan struct{}) {
		_ = cmd.Wait()
		close(ended)
	}(s.cmd, s.ended)
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if s.http == nil {
			s.connect()
		}
		if s.http != nil {
			if _, err := s.Try(http.MethodGet, "/readyz", "", nil); err == nil {
				return
			}
		}
		select {
		case <-s.ended:
			s.t.Fatalf("kube-apiserver exited:\n%s", s.tail())
		default:
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("kube-apiserver is not ready:\n%s", s.tail())
		}
	}
}

// Stop kills the server, as a crash would.
func (s *Server) Stop() {
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Kill()
	<-s.ended
	s.cmd = nil
	if s.http != nil {
		s.http.CloseIdleConnections()
	}
}

func (s *Server) connect() {
	ca, err := os.ReadFile(s.CAFile())
	if err != nil {
		return // not written yet
	}
	pool := x509.NewCertPool()
	if pool.AppendCertsFromPEM(ca) {
		s.http = &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}}}
	}
}

// Try sends a request as the administrator.
func (s *Server) Try(method, path, contentType string, body any) ([]byte, error) {
	var text []byte
	switch b := body.(type) {
	case nil:
	case string:
		text = []byte(b)
	default:
		var err error
		if text, err = json.Marshal(b); err != nil {
			return nil, err
		}
	}
	req, err := http.NewRequestWithContext(context.Background(), method, s.URL()+path, bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+AdminToken)
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := s.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, answer)
	}
	return answer, err
}

// Do is Try; it fails the test on an error.
func (s *Server) Do(method, path, contentType string, body any) []byte {
	s.t.Helper()
	answer, err := s.Try(method, path, contentType, body)
	if err != nil {
		s.t.Fatal(err)
	}
	return answer
}

// Apply sends text as a server-side apply to path.
func (s *Server) Apply(path, contentType string, text string) {
	s.t.Helper()
	s.Do(http.MethodPatch, path+"?fieldManager=test&force=true", contentType, text)
}

// PutNode creates a Node, or patches an existing one. A nil annotation is removed.
func (s *Server) PutNode(name string, podCIDRs []string, annotations map[string]any) {
	s.t.Helper()
	spec := map[string]any{}
	if len(podCIDRs) > 0 {
		spec["podCIDR"], spec["podCIDRs"] = podCIDRs[0], podCIDRs
	}
	node := map[string]any{"apiVersion": "v1", "kind": "Node", "metadata": map[string]any{"name": name, "annotations": annotations}, "spec": spec}
	if _, err := s.Try(http.MethodGet, "/api/v1/nodes/"+name, "", nil); err == nil {
		s.Do(http.MethodPatch, "/api/v1/nodes/"+name, "application/merge-patch+json", node)
		return
	}
	s.Do(http.MethodPost, "/api/v1/nodes", "application/json", node)
}

// DeleteNode deletes a Node, if it exists.
func (s *Server) DeleteNode(name string) {
	s.t.Helper()
	if _, err := s.Try(http.MethodDelete, "/api/v1/nodes/"+name, "", nil); err != nil && !strings.Contains(err.Error(), "404") {
		s.t.Fatal(err)
	}
}

// Node is the part of a Node that tests use.
type Node struct {
	Metadata struct {
		Name        string
		UID         string
		Annotations map[string]string
	}
	Spec   struct{ PodCIDRs []string }
	Status struct {
		Conditions []struct{ Type, Status, Reason string }
	}
}

// GetNode reads a Node.
func (s *Server) GetNode(name string) Node {
	s.t.Helper()
	var n Node
	if err := json.Unmarshal(s.Do(http.MethodGet, "/api/v1/nodes/"+name, "", nil), &n); err != nil {
		s.t.Fatal(err)
	}
	return n
}

func (s *Server) tail() string {
	text, _ := os.ReadFile(filepath.Join(s.dir, "log"))
	return string(text[max(0, len(text)-4000):])
}

func write(t testing.TB, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func writeKey(t testing.TB, name string) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	write(t, name, string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})))
}

// Become makes this server, which must be stopped, use the etcd of another one. It
// keeps its certificate and port.
func (s *Server) Become(other *Server) {
	for i, a := range s.args {
		if strings.HasPrefix(a, "--etcd-servers=") {
			for _, b := range other.args {
				if strings.HasPrefix(b, "--etcd-servers=") {
					s.args[i] = b
				}
			}
		}
	}
}
