package contract_test

import (
	"fmt"
	"net/netip"
	"testing"

	"culvert/subnet"
	"culvert/subnet/contract"
)

// memory adapts subnet.Memory, which all nodes share.
type memory struct{ store *subnet.Memory }

func (m memory) SetConfig(_ *testing.T, text string) {
	// Memory stores parsed configurations: ignore an invalid text.
	if cfg, _, err := subnet.ParseConfig([]byte(text)); err == nil {
		m.store.SetConfig(cfg)
	}
}

func (m memory) Open(*testing.T, int, string) subnet.Registry { return m.store }

func (m memory) PutPeer(_ *testing.T, n int, public netip.Addr) {
	m.store.Put(key(n), fmt.Appendf(nil, `{"PublicIP":"%s","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"%s"}}`, public, contract.PeerMAC(n)))
}

func (m memory) SpoilPeer(_ *testing.T, n int) { m.store.Put(key(n), []byte("spoilt")) }

func (m memory) DropPeer(_ *testing.T, n int) { m.store.Delete(key(n)) }

func key(n int) string { return subnet.FormatKey([]netip.Prefix{contract.PeerSubnet(n)}) }

func TestMemory(t *testing.T) {
	contract.Run(t, func(*testing.T) contract.Store { return memory{subnet.NewMemory()} })
}
