package etcd

import (
	"fmt"
	"net/netip"
	"testing"

	"culvert/subnet"
	"culvert/subnet/contract"
	"culvert/subnet/etcd/etcdtest"
	"culvert/subnet/etcd/member"
)

// contractStore is a real etcd that keeps its data when stopped.
type contractStore struct {
	server *etcdtest.Server
	admin  *Registry
}

func (s *contractStore) SetConfig(t *testing.T, text string) {
	put(t, s.admin, "config", text) // not validated
}

func (s *contractStore) Open(t *testing.T, _ int, dir string) subnet.Registry {
	return open(t, s.server.URL(), withFiles(dir))
}

func (s *contractStore) key(n int) string {
	return "subnets/" + subnet.FormatKey([]netip.Prefix{contract.PeerSubnet(n)})
}

func (s *contractStore) PutPeer(t *testing.T, n int, public netip.Addr) {
	put(t, s.admin, s.key(n), fmt.Sprintf(`{"PublicIP":"%s","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"%s"}}`, public, contract.PeerMAC(n)))
}

func (s *contractStore) SpoilPeer(t *testing.T, n int) { put(t, s.admin, s.key(n), "spoilt") }

func (s *contractStore) DropPeer(t *testing.T, n int) {
	if _, err := s.admin.client.Delete(t.Context(), s.admin.directory()+s.key(n)); err != nil {
		t.Fatal(err)
	}
}

func (s *contractStore) Stop(*testing.T)  { s.server.Stop() }
func (s *contractStore) Start(*testing.T) { s.server.Start() }

func TestContract(t *testing.T) {
	t.Parallel()
	contract.RunRemote(t, func(t *testing.T) contract.Remote {
		t.Parallel() // each part has its own server
		server := etcdtest.StartServer(t, member.Options{})
		return &contractStore{server, open(t, server.URL())}
	})
}
