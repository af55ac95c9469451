package kube

import (
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"sigs.k8s.io/yaml"
)

// DefaultNetConf is where flannel's manifests mount its ConfigMap.
const DefaultNetConf = "/etc/kube-flannel/net-conf.json"

// ServiceAccountDir is where Kubernetes mounts a pod's token and the CA.
const ServiceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// Options configure access to the API server. No text form of them shows a token.
type Options struct {
	// Server is the API server's URL. Default: from Kubeconfig, or else from the
	// pod's environment.
	Server string
	// Kubeconfig is a file whose current context is used; none if empty.
	Kubeconfig string
	// Node is the name of this host's Node; required by New.
	Node string
	// Prefix is the prefix of the annotations; default DefaultPrefix.
	Prefix string
	// NetConf is the file with the network configuration; default
	// DefaultNetConf. Changes take effect while the node runs.
	NetConf string
	// NetworkUnavailable enables setting this condition of the Node to False.
	NetworkUnavailable bool
	// SnapshotFile stores all leases as last read, for a start while the API
	// server is unreachable (Kept); none if empty.
	SnapshotFile string
	// RequestTimeout limits one request; default 10 s. A list has six times that.
	RequestTimeout time.Duration
	// Settle is how long the peers of the last snapshot are kept when the API
	// server is restored to an older state; default 2 minutes.
	Settle time.Duration
	// Waiting is called with what Config, Acquire and TakenBy wait for and how to
	// fix it; may be nil.
	Waiting func(why string) `json:"-"`
	// Observe is told how long each request took until its answer began; may be nil.
	Observe func(operation string, took time.Duration, failed bool) `json:"-"`
	// Logger is required.
	Logger *slog.Logger
}

// InCluster reports whether this process has a service account's token and the
// API server's address, as in a pod.
func InCluster() bool {
	_, err := os.Stat(filepath.Join(ServiceAccountDir, "token"))
	return err == nil && os.Getenv("KUBERNETES_SERVICE_HOST") != ""
}

// access is the address of the API server and the credentials. Files are read
// again, since they are renewed in place.
type access struct {
	server     *url.URL
	serverName string // expected in its certificate; default: the URL's host
	insecure   bool   // do not verify the certificate

	ca, cert, key             []byte // PEM
	caFile, certFile, keyFile string
	token, tokenFile          string
}

// complete validates the options and fills in the defaults.
func (o Options) complete() (Options, access, error) {
	if o.Logger == nil {
		return o, access{}, errors.New("kubernetes: no logger")
	}
	for _, d := range []struct {
		value *string
		usual string
	}{{&o.Prefix, DefaultPrefix}, {&o.NetConf, DefaultNetConf}} {
		if *d.value == "" {
			*d.value = d.usual
		}
	}
	if o.RequestTimeout == 0 {
		o.RequestTimeout = 10 * time.Second
	}
	if o.Settle == 0 {
		o.Settle = 2 * time.Minute
	}
	if o.Waiting == nil {
		o.Waiting = func(string) {}
	}
	a, err := o.access()
	return o, a, err
}

// URL returns the API server's URL, "" if the options do not say where it is.
func (o Options) URL() string {
	a, err := o.access()
	if err != nil {
		return ""
	}
	return a.server.String()
}

func (o Options) access() (access, error) {
	var a access
	server := o.Server
	switch {
	case o.Kubeconfig != "":
		var err error
		if a, err = readKubeconfig(o.Kubeconfig); err != nil {
			return a, fmt.Errorf("--kubeconfig-file %s: %w", o.Kubeconfig, err)
		}
	case InCluster():
		a.tokenFile, a.caFile = filepath.Join(ServiceAccountDir, "token"), filepath.Join(ServiceAccountDir, "ca.crt")
		a.server = &url.URL{Scheme: "https", Host: net.JoinHostPort(os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT"))}
	case server == "":
		return a, fmt.Errorf("kubernetes: no API server: in a pod, mount a service account at %s; elsewhere, set --kubeconfig-file", ServiceAccountDir)
	}
	if server != "" {
		u, err := url.Parse(server)
		if err != nil || u.Hostname() == "" || u.Scheme != "http" && u.Scheme != "https" || u.User != nil {
			return a, fmt.Errorf("--kube-api-url %s: not a URL such as https://10.0.0.1:6443", server)
		}
		a.server = u
	}
	if a.server == nil {
		return a, errors.New("kubernetes: the kubeconfig names no server")
	}
	a.server.Path = strings.TrimSuffix(a.server.Path, "/")
	return a, nil
}

// kubeconfig is the supported part of the file.
type kubeconfig struct {
	CurrentContext string `json:"current-context"`
	Contexts       []struct {
		Name    string `json:"name"`
		Context struct {
			Cluster string `json:"cluster"`
			User    string `json:"user"`
		} `json:"context"`
	} `json:"contexts"`
	Clusters []struct {
		Name    string `json:"name"`
		Cluster struct {
			Server     string `json:"server"`
			CA         string `json:"certificate-authority"`
			CAData     string `json:"certificate-authority-data"`
			ServerName string `json:"tls-server-name"`
			Insecure   bool   `json:"insecure-skip-tls-verify"`
		} `json:"cluster"`
	} `json:"clusters"`
	Users []struct {
		Name string `json:"name"`
		User struct {
			Token     string `json:"token"`
			TokenFile string `json:"tokenFile"`
			Cert      string `json:"client-certificate"`
			CertData  string `json:"client-certificate-data"`
			Key       string `json:"client-key"`
			KeyData   string `json:"client-key-data"`
			Exec      any    `json:"exec"`
			Provider  any    `json:"auth-provider"`
		} `json:"user"`
	} `json:"users"`
}

func readKubeconfig(name string) (access, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return access{}, err
	}
	a, err := parseKubeconfig(text)
	if err != nil {
		return access{}, err
	}
	// Relative names are relative to the kubeconfig's directory, as in kubectl.
	for _, f := range []*string{&a.caFile, &a.certFile, &a.keyFile, &a.tokenFile} {
		if *f != "" && !filepath.IsAbs(*f) {
			*f = filepath.Join(filepath.Dir(name), *f)
		}
	}
	return a, nil
}

func parseKubeconfig(text []byte) (access, error) {
	var k kubeconfig
	if err := yaml.Unmarshal(text, &k); err != nil {
		return access{}, fmt.Errorf("it is not a kubeconfig: %w", err)
	}
	var a access
	for _, c := range k.Contexts {
		if c.Name != k.CurrentContext {
			continue
		}
		for _, l := range k.Clusters {
			if l.Name != c.Context.Cluster {
				continue
			}
			u, err := url.Parse(l.Cluster.Server)
			if err != nil || u.Hostname() == "" {
				return access{}, fmt.Errorf("the server of its cluster %q is not a URL", l.Name)
			}
			a.server, a.caFile, a.serverName, a.insecure = u, l.Cluster.CA, l.Cluster.ServerName, l.Cluster.Insecure
			if a.ca, err = base64.StdEncoding.DecodeString(l.Cluster.CAData); err != nil {
				return access{}, fmt.Errorf("the certificate-authority-data of its cluster %q: %w", l.Name, err)
			}
		}
		for _, u := range k.Users {
			if u.Name != c.Context.User {
				continue
			}
			if u.User.Exec != nil || u.User.Provider != nil {
				return access{}, fmt.Errorf("its user %q gets credentials from a plugin, which is not supported: use a service account's token or a client certificate", u.Name)
			}
			a.token, a.tokenFile, a.certFile, a.keyFile = u.User.Token, u.User.TokenFile, u.User.Cert, u.User.Key
			var err error
			if a.cert, err = base64.StdEncoding.DecodeString(u.User.CertData); err == nil {
				a.key, err = base64.StdEncoding.DecodeString(u.User.KeyData)
			}
			if err != nil {
				return access{}, fmt.Errorf("the client certificate of its user %q: %w", u.Name, err)
			}
		}
	}
	if a.server == nil {
		return access{}, fmt.Errorf("its current context %q names no cluster", k.CurrentContext)
	}
	return a, nil
}
