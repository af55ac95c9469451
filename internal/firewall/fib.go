package firewall

import (
	"errors"
	"sync"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"culvert/internal/names"
)

// HasFIB reports whether the kernel has nftables' fib expression
// (NFT_FIB_INET), by adding a rule with it and deleting it in the same
// transaction. It checks once per process.
var HasFIB = sync.OnceValue(func() bool {
	c, err := nftables.New()
	if err != nil {
		return true // writing the table will return the error
	}
	t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: names.TableProbe})
	ch := c.AddChain(&nftables.Chain{
		Name: "arrived", Table: t, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityFilter,
	})
	c.AddRule(&nftables.Rule{Table: t, Chain: ch, Exprs: all(notTheWayBack(), leave()).exprs})
	c.DelTable(t)
	err = c.Flush()
	return !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EOPNOTSUPP)
})
