package host

import (
	"errors"
	"sync"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// offersFIB says whether the kernel has nftables' fib expression (NFT_FIB_INET),
// by adding a rule with it and removing it in the same transaction. It is asked
// once: the kernel does not change under a process.
var offersFIB = sync.OnceValue(func() bool {
	c, err := nftables.New()
	if err != nil {
		return true // writing the table will say what is wrong
	}
	t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: TableName + "-probe"})
	ch := c.AddChain(&nftables.Chain{
		Name: "forward", Table: t, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter,
	})
	c.AddRule(&nftables.Rule{Table: t, Chain: ch, Exprs: all(notTheWayBack(), leave()).exprs})
	c.DelTable(t)
	err = c.Flush()
	return !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EOPNOTSUPP)
})
