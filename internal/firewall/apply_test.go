package firewall_test

import (
	"fmt"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"culvert/internal/firewall"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// TestRefusedStep has the kernel refuse two of several steps: the error names the first of
// them, and none is applied.
func TestRefusedStep(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: "test"}
	chain := &nftables.Chain{Name: "all", Table: table}
	rule := func(command string, e expr.Any) firewall.Step {
		return firewall.NewStep(command, func(c *nftables.Conn) {
			c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{e}})
		})
	}
	missing := &expr.Lookup{SourceRegister: 1, SetName: "missing"}
	steps := []firewall.Step{
		firewall.NewStep("table", func(c *nftables.Conn) { c.AddTable(table) }),
		firewall.NewStep("chain", func(c *nftables.Conn) { c.AddChain(chain) }),
		rule("good", &expr.Counter{}), rule("bad", missing), rule("good again", &expr.Counter{}), rule("bad again", missing),
	}
	err := l.Nodes[0].Do(func() error {
		if _, err := firewall.Apply(steps); err == nil || err.Error() != "nftables: bad: netlink receive: no such file or directory" {
			return fmt.Errorf("the steps were refused with %q", err)
		}
		if n := tables(); n != 0 {
			return fmt.Errorf("%d tables are left", n)
		}
		if _, err := firewall.Apply(steps[:3]); err != nil {
			return err
		}
		if n := tables(); n != 1 {
			return fmt.Errorf("%d tables after the good steps", n)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// tables counts the tables; -1 if they cannot be listed.
func tables() int {
	c, err := nftables.New()
	if err != nil {
		return -1
	}
	all, err := c.ListTables()
	if err != nil {
		return -1
	}
	return len(all)
}
