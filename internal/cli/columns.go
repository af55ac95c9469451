package cli

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// screen describes the width available for output.
type screen struct {
	width int
	// wrap says that long lines are wrapped between words: on a terminal, or if COLUMNS
	// gives a width. Output to a file or a pipe is not wrapped, for grep.
	wrap bool
}

const defaultWidth = 80

// screenOf returns the screen that w is shown on.
func screenOf(w io.Writer) screen {
	switch w := w.(type) {
	case *sheet:
		return w.screen
	case *os.File:
		if size, err := unix.IoctlGetWinsize(int(w.Fd()), unix.TIOCGWINSZ); err == nil && size.Col > 0 {
			return screen{int(size.Col), true}
		}
	}
	if n, err := strconv.Atoi(os.Getenv("COLUMNS")); err == nil && n > 0 {
		return screen{n, true}
	}
	return screen{defaultWidth, false}
}

// sheet is buffered output that knows its screen.
type sheet struct {
	*bufio.Writer
	screen screen
}

func newSheet(w io.Writer) *sheet { return &sheet{bufio.NewWriterSize(w, 64<<10), screenOf(w)} }

// columns aligns cells that are separated by tabs, as text/tabwriter does. The last cell of
// a row is wrapped, under its beginning, if the screen wraps. If columns may be left out,
// the first row is the headings.
type columns struct {
	w io.Writer
	bytes.Buffer
	// dispensable are the headings of columns that are left out if not all fit, the least
	// important first; short is the heading of the column whose cells are cut on a
	// terminal if even that is not enough.
	dispensable []string
	short       string
}

func newColumns(w io.Writer) *columns { return &columns{w: w} }

const gap = 2

// Flush writes the collected rows.
func (c *columns) Flush() error {
	on := screenOf(c.w)
	var rows [][]string
	for line := range strings.Lines(c.String()) {
		rows = append(rows, strings.Split(strings.TrimSuffix(line, "\n"), "\t"))
	}
	c.Reset()
	widths := c.fit(rows, on)
	var b []byte
	for _, row := range rows {
		b = b[:0]
		indent := 0
		for i, cell := range row[:len(row)-1] {
			b = append(b, cell...)
			b = append(b, strings.Repeat(" ", widths[i]+gap-utf8.RuneCountInString(cell))...)
			indent += widths[i] + gap
		}
		last := []string{row[len(row)-1]}
		if on.wrap {
			last = wrapped(last[0], on.width-indent)
		}
		b = append(b, strings.Join(last, "\n"+strings.Repeat(" ", indent))...)
		if _, err := c.w.Write(append(bytes.TrimRight(b, " "), '\n')); err != nil {
			return err
		}
	}
	return nil
}

// fit leaves out columns, or cuts one, until the rows fit the screen, and returns the
// columns' widths.
func (c *columns) fit(rows [][]string, on screen) (widths []int) {
	widths = widthsOf(rows)
	for _, heading := range c.dispensable {
		if total(widths) <= on.width {
			return widths
		}
		if at := slices.Index(rows[0], heading); at >= 0 {
			widths = slices.Delete(widths, at, at+1)
			for i := range rows {
				rows[i] = slices.Delete(rows[i], at, at+1)
			}
		}
	}
	if c.short == "" || len(rows) == 0 || !on.wrap {
		return widths
	}
	at := slices.Index(rows[0], c.short)
	if over := total(widths) - on.width; at >= 0 && over > 0 {
		most := max(8, widths[at]-over)
		for _, row := range rows {
			row[at] = shortened(row[at], most)
		}
		return widthsOf(rows)
	}
	return widths
}

// total returns the width of a row of these columns.
func total(widths []int) int {
	sum := -gap
	for _, w := range widths {
		sum += w + gap
	}
	return sum
}

func widthsOf(rows [][]string) []int {
	var widths []int
	for _, row := range rows {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	return widths
}

// shortened cuts a text after most characters.
func shortened(text string, most int) string {
	if runes := []rune(text); len(runes) > most {
		return string(runes[:most-1]) + "…"
	}
	return text
}

// leastText is the minimum width for wrapping.
const leastText = 24

// wrapped breaks a text between words into lines of at most width. A longer word is left
// whole, so that it can be copied.
func wrapped(text string, width int) []string {
	if width < leastText {
		return []string{text}
	}
	var lines []string
	line := ""
	for _, word := range strings.Split(text, " ") {
		switch {
		case line == "":
			line = word
		case utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) <= width:
			line += " " + word
		default:
			lines = append(lines, line)
			line = word
		}
	}
	return append(lines, line)
}

// sentence writes a line, wrapped with an indent if the screen wraps.
func sentence(w io.Writer, format string, args ...any) error {
	text := fmt.Sprintf(format, args...)
	if on := screenOf(w); on.wrap {
		const indent = "    "
		text = strings.Join(wrapped(text, on.width-len(indent)), "\n"+indent)
	}
	_, err := fmt.Fprintln(w, text)
	return err
}
