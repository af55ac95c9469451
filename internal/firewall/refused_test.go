package firewall

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"culvert/internal/remedy"
)

// TestRefused checks the errors if the kernel has no nftables or denies access to it.
func TestRefused(t *testing.T) {
	for _, c := range []struct {
		err      error
		what, do string
	}{
		{unix.EPROTONOSUPPORT, "opening nftables: the kernel has no nftables: protocol not supported", "load it (`modprobe nf_tables`), or use a kernel with CONFIG_NF_TABLES_INET"},
		{fmt.Errorf("netlink: %w", unix.EOPNOTSUPP), "opening nftables: the kernel has no nftables: netlink: operation not supported", "load it (`modprobe nf_tables`), or use a kernel with CONFIG_NF_TABLES_INET"},
		{unix.EPERM, "opening nftables: operation not permitted", "run it as root, with CAP_NET_ADMIN in this network namespace, and without a seccomp or security policy that forbids netlink to netfilter"},
		{unix.EBUSY, "opening nftables: device or resource busy", ""},
	} {
		err := refused("opening nftables", c.err)
		if what, do := remedy.Split(err); what != c.what || do != c.do || !errors.Is(err, c.err) {
			t.Errorf("%v: got %q and %q", c.err, what, do)
		}
	}
}
