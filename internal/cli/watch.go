package cli

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// addWatch adds the --watch flag. what describes how the output differs with it.
func addWatch(c *cobra.Command, every *time.Duration, what string) {
	c.Flags().DurationVar(every, "watch", 0, "repeat at this interval (2s if none is given), "+what)
	c.Flags().Lookup("watch").NoOptDefVal = "2s"
}

// show calls frame once, or with an interval until ctx ends, which is not an error. On a
// terminal each frame replaces the previous one in one write, so that nothing flickers,
// and is cut to the terminal's size. Elsewhere frames follow each other; tables have a
// line with the time before them and an empty one between them.
//
// It raises GOGC, unless the environment sets it: what a command reads from the daemon takes
// some MB with 5,000 peers, of which hardly anything can be freed before the command ends.
//
// If a frame other than the first fails, for example because the daemon restarts, the
// error is shown in place of the table, and show continues with the next frame.
func show(ctx context.Context, w io.Writer, every time.Duration, out output, frame func(context.Context, io.Writer) error) error {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(800)
	}
	switch {
	case every < 0:
		return usagef("--watch %s: a positive time", every)
	case every == 0:
		return frame(ctx, w)
	}
	table := out != "json" && out != "yaml"
	for first := true; ; first = false {
		on, height := screenOf(w), terminalHeight(w)
		var b bytes.Buffer
		s := &sheet{bufio.NewWriter(&b), on}
		if table {
			writeClock(s, every, height > 0)
		}
		err := frame(ctx, s)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && (first || !table):
			return err
		case err != nil:
			_ = sentence(s, "%s; trying again", oneLine(err.Error()))
		}
		_ = s.Flush()
		text := b.Bytes()
		switch {
		case table && height > 0:
			text = inPlace(b.String(), on.width, height, first)
		case table:
			text = append(text, '\n')
		}
		if _, err := w.Write(text); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(every):
		}
	}
}

func writeClock(w io.Writer, every time.Duration, terminal bool) {
	if terminal {
		fmt.Fprintf(w, "%s, every %s, until ctrl-C\n\n", time.Now().Format(time.TimeOnly), every)
		return
	}
	fmt.Fprintln(w, time.Now().Format(time.RFC3339))
}

// terminalHeight returns the number of rows of the terminal that w is; 0 if it is none.
func terminalHeight(w io.Writer) int {
	f, ok := w.(*os.File)
	if !ok {
		return 0
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0
	}
	return int(size.Row)
}

// inPlace returns the control sequences (ECMA-48) that write text over what a terminal shows:
// at most its height, with the last line, each line to the end of its row, and nothing
// below.
func inPlace(text string, width, height int, first bool) []byte {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if most := max(3, height-1); len(lines) > most { // the cursor has the last row
		last := lines[len(lines)-1]
		left := len(lines) - most + 1
		lines = append(lines[:most-2:most-2], fmt.Sprintf("... %d more lines", left), last)
	}
	var b bytes.Buffer
	b.WriteString("\x1b[H") // cursor to the upper left
	if first {
		b.WriteString("\x1b[2J") // clear the screen
	}
	for _, line := range lines {
		b.WriteString(shortened(line, width))
		b.WriteString("\x1b[K\n") // clear the rest of the row
	}
	b.WriteString("\x1b[J") // clear what is below
	return b.Bytes()
}
