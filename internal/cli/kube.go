package cli

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"culvert/internal/daemon"
	"culvert/subnet/kube"
)

// kubeFlags are the flags for Kubernetes as the store. They have flannel's names.
type kubeFlags struct {
	manager     bool
	kubeconfig  string
	server      string
	prefix      string
	netConf     string
	unavailable bool
}

func (f *kubeFlags) addTo(flags *pflag.FlagSet) {
	flags.BoolVar(&f.manager, "kube-subnet-mgr", false, "the same as --store=kubernetes")
	flags.StringVar(&f.kubeconfig, "kubeconfig-file", "", "kubeconfig file (default: the pod's service account)")
	flags.StringVar(&f.server, "kube-api-url", "", "URL of the Kubernetes API server, in place of that of the service account or the kubeconfig")
	flags.StringVar(&f.prefix, "kube-annotation-prefix", kube.DefaultPrefix, "prefix of the annotations on Nodes")
	flags.StringVar(&f.netConf, "net-config-path", kube.DefaultNetConf, "file with the network configuration, with --store=kubernetes")
	flags.BoolVar(&f.unavailable, "set-node-network-unavailable", true, "set the Node's condition NetworkUnavailable to False once packets are forwarded")
}

// inKubernetes resolves --store: whether the store is Kubernetes.
func (f *runFlags) inKubernetes(c *cobra.Command) (bool, error) {
	given := c.Flags().Changed("etcd-endpoints") || f.embedded
	if f.kube.manager {
		if f.store == "etcd" {
			return false, usagef("--kube-subnet-mgr and --store=etcd exclude each other")
		}
		f.store = "kubernetes"
	}
	switch f.store {
	case "etcd":
		return false, nil
	case "auto":
		return !given && (kube.InCluster() || f.kube.kubeconfig != ""), nil
	case "kubernetes":
		if given {
			return false, usagef("--store=kubernetes needs no etcd: leave out --etcd-endpoints and --embedded-etcd")
		}
		return true, nil
	}
	return false, usagef("--store %s: auto, etcd or kubernetes", f.store)
}

// nodeNameLimit bounds the request for the pod's Node. If it fails the daemon ends, and
// Kubernetes restarts it.
const nodeNameLimit = time.Minute

// options returns how to reach the API, and sets o.Node to the name of the Node.
func (f *kubeFlags) options(ctx context.Context, o *daemon.Options, log *slog.Logger) (*kube.Options, error) {
	k := kube.Options{
		Server: f.server, Kubeconfig: f.kubeconfig, Prefix: f.prefix, NetConf: f.netConf, NetworkUnavailable: f.unavailable,
		SnapshotFile: filepath.Join(o.RunDir, "snapshot.json"), Logger: log,
	}
	if o.Node == "" {
		o.Node = os.Getenv("NODE_NAME")
	}
	if o.Node == "" {
		namespace, pod := os.Getenv("POD_NAMESPACE"), os.Getenv("POD_NAME")
		if namespace == "" || pod == "" {
			return nil, usagef("--store=kubernetes: which Node is this? Set NODE_NAME, or POD_NAME and POD_NAMESPACE, or give --node-id")
		}
		ctx, cancel := context.WithTimeout(ctx, nodeNameLimit)
		defer cancel()
		var err error
		for {
			if o.Node, err = kube.NodeName(ctx, k, namespace, pod); err == nil {
				break
			}
			log.Warn("cannot find the name of this Node yet", "error", err)
			select {
			case <-ctx.Done():
				return nil, err
			case <-time.After(time.Second):
			}
		}
	}
	k.Node = o.Node
	return &k, nil
}
