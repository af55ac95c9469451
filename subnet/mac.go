package subnet

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
)

// ParseMAC parses a 6-byte address in any form that net.ParseMAC accepts, such
// as c6:d2:32:6f:8f:44.
func ParseMAC(s string) (MAC, error) {
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != len(MAC{}) {
		return MAC{}, fmt.Errorf("%q is not an Ethernet address", clip(s))
	}
	return MAC(hw), nil
}

// String returns the address in lower case with colons, as the ip command and
// flannel write it.
func (m MAC) String() string {
	b := make([]byte, 0, 17)
	for i, octet := range m {
		if i > 0 {
			b = append(b, ':')
		}
		b = hex.AppendEncode(b, []byte{octet})
	}
	return string(b)
}

// MarshalText implements encoding.TextMarshaler.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *MAC) UnmarshalText(text []byte) error {
	parsed, err := ParseMAC(string(text))
	if err != nil {
		return err
	}
	*m = parsed
	return nil
}

// IsUnicast reports whether m is a valid device address: neither zero nor a
// group address (IEEE 802: the lowest bit of the first octet).
func (m MAC) IsUnicast() bool { return m != MAC{} && m[0]&1 == 0 }

// DeriveMAC derives a node's VTEP address from a SHA-256 of node, VNI and
// family. It is stable, so that peers' neighbour caches remain valid when the
// node restarts. The address is unicast and locally administered.
func DeriveMAC(node string, vni uint32, ipv6 bool) MAC {
	seed := append([]byte("culvert vtep\x00"), node...)
	seed = append(seed, 0)
	seed = binary.BigEndian.AppendUint32(seed, vni)
	if ipv6 {
		seed = append(seed, 6)
	} else {
		seed = append(seed, 4)
	}
	sum := sha256.Sum256(seed)
	m := MAC(sum[:6])
	m[0] = m[0]&^1 | 2
	return m
}

// clip shortens untrusted text for an error message.
func clip(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	return s[:most] + "..."
}
