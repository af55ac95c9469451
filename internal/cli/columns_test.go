package cli

import (
	"bufio"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

func TestColumns(t *testing.T) {
	for _, c := range []struct {
		name string
		on   screen
		want string
	}{
		{"all fit", screen{60, true}, `NODE             SUBNET       MTU   HEARD   DROPS
worker-in-oslo   10.5.1.0/24  1450  3s ago  0
worker-in-turku  10.5.2.0/24  1450  -       12
`},
		{"one is left out", screen{45, false}, `NODE             SUBNET       HEARD   DROPS
worker-in-oslo   10.5.1.0/24  3s ago  0
worker-in-turku  10.5.2.0/24  -       12
`},
		{"names are cut on a terminal", screen{30, true}, `NODE        SUBNET       DROPS
worker-in…  10.5.1.0/24  0
worker-in…  10.5.2.0/24  12
`},
		{"but not in a file", screen{30, false}, `NODE             SUBNET       DROPS
worker-in-oslo   10.5.1.0/24  0
worker-in-turku  10.5.2.0/24  12
`},
	} {
		t.Run(c.name, func(t *testing.T) {
			var b strings.Builder
			out := &sheet{bufio.NewWriter(&b), c.on}
			w := newColumns(out)
			w.dispensable, w.short = []string{"MTU", "HEARD"}, "NODE"
			fmt.Fprintln(w, "NODE\tSUBNET\tMTU\tHEARD\tDROPS")
			fmt.Fprintln(w, "worker-in-oslo\t10.5.1.0/24\t1450\t3s ago\t0")
			fmt.Fprintln(w, "worker-in-turku\t10.5.2.0/24\t1450\t-\t12")
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
			if _ = out.Flush(); b.String() != c.want {
				t.Errorf("got\n%s\nwant\n%s", b.String(), c.want)
			}
		})
	}
}

func TestColumnsWrapTheLastCell(t *testing.T) {
	const want = `state      ready
warning    the port 8472 is taken by
           another program, which is
           not culvert
  command  ` + "`ss -lunp`" + `
`
	var b strings.Builder
	out := &sheet{bufio.NewWriter(&b), screen{38, true}}
	w := newColumns(out)
	fmt.Fprintln(w, "state\tready")
	fmt.Fprintln(w, "warning\tthe port 8472 is taken by another program, which is not culvert")
	fmt.Fprintln(w, "  command\t`ss -lunp`")
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	if _ = out.Flush(); b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
}

// TestHelpFits80Columns looks at the help of every command.
func TestHelpFits80Columns(t *testing.T) {
	var look func(*cobra.Command)
	look = func(c *cobra.Command) {
		var b strings.Builder
		c.SetOut(&b)
		if err := c.Help(); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(b.String()) {
			if line = strings.TrimSuffix(line, "\n"); utf8.RuneCountInString(line) > defaultWidth && !strings.HasPrefix(line, "  culvert ") {
				t.Errorf("%s --help: %d columns: %s", c.CommandPath(), utf8.RuneCountInString(line), line)
			}
		}
		for _, sub := range c.Commands() {
			look(sub)
		}
	}
	root := newRootCommand()
	root.InitDefaultHelpCmd()
	look(root)
}

func TestNearest(t *testing.T) {
	names := []string{"status", "peers", "ping", "page", "doctor", "trace", "report", "config"}
	for word, want := range map[string]string{"statsu": "status", "peer": "peers", "pnig": "ping", "dcotor": "doctor", "conf": "config", "nonsense": "", "x": "", "trce": "trace"} {
		if got := nearest(word, names, func(s string) string { return s }); got != want {
			t.Errorf("%s: got %q, want %q", word, got, want)
		}
	}
}
