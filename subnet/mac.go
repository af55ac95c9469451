package subnet

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
)

// ParseMAC reads an address of six bytes in any of the forms that
// net.ParseMAC takes, such as c6:d2:32:6f:8f:44.
func ParseMAC(s string) (MAC, error) {
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != len(MAC{}) {
		return MAC{}, fmt.Errorf("%q is not an Ethernet address", clip(s))
	}
	return MAC(hw), nil
}

// String returns the form with colons and small letters, as the ip command
// and flannel write it.
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

// MarshalText is String, for JSON.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText is ParseMAC.
func (m *MAC) UnmarshalText(text []byte) error {
	parsed, err := ParseMAC(string(text))
	if err != nil {
		return err
	}
	*m = parsed
	return nil
}

// IsUnicast reports whether one device can bear the address: it is neither
// zero nor a group address (IEEE 802, the lowest bit of the first octet).
func (m MAC) IsUnicast() bool { return m != MAC{} && m[0]&1 == 0 }

// DeriveMAC returns the VTEP address of a node: always the same one for the
// same node, VNI and family, so that a restarted node is met under the
// address that its peers still have in their caches. It is unicast and locally
// administered, taken from a SHA-256.
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

// clip shortens text of unknown origin for an error message.
func clip(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	return s[:most] + "..."
}
