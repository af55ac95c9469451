package cli

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

// TestDocumentedCommands parses every culvert command line of the documentation: the
// commands, flags and arguments are there. TestDocs (in test) runs those of the pages that
// have a reader type them in order.
func TestDocumentedCommands(t *testing.T) {
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, page := range append(pages, "../../README.md") {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, args := range documented(string(text)) {
			seen++
			line := filepath.Base(page) + ": culvert " + strings.Join(args, " ")
			root := newRootCommand()
			c, rest, err := root.Find(withValues(root, args))
			if err != nil {
				t.Errorf("%s: %v", line, err)
				continue
			}
			if err := c.ParseFlags(rest); err != nil {
				t.Errorf("%s: %v", line, err)
				continue
			}
			if help, _ := c.Flags().GetBool("help"); help {
				continue
			}
			if err := c.ValidateArgs(c.Flags().Args()); err != nil {
				t.Errorf("%s: %v", line, err)
			}
		}
	}
	if seen < 30 {
		t.Errorf("only %d command lines were found", seen)
	}
}

// documented returns the arguments of the culvert commands in a page's indented and
// console blocks.
func documented(page string) (all [][]string) {
	prompt := regexp.MustCompile(`^(\w*# )?`)
	page = strings.ReplaceAll(page, "\\\n", " ")
	inside := false
	for line := range strings.Lines(page) {
		trimmed := strings.TrimSpace(line)
		if strings.HasPrefix(trimmed, "```") {
			inside = !inside && trimmed == "```console"
			continue
		}
		if !inside && !strings.HasPrefix(line, "    ") {
			continue
		}
		trimmed = prompt.ReplaceAllString(trimmed, "")
		for _, command := range regexp.MustCompile(`&&?|;|\|`).Split(trimmed, -1) {
			words := shellWords(command)
			if len(words) > 1 && words[0] == "culvert" && regexp.MustCompile(`^[a-z-]+$`).MatchString(words[1]) {
				all = append(all, words[1:])
			}
		}
	}
	return all
}

// shellWords splits a command line at spaces outside quotes, and ends at a comment.
func shellWords(line string) (words []string) {
	var word strings.Builder
	quote, some := rune(0), false
	end := func() {
		if some {
			words = append(words, word.String())
		}
		word.Reset()
		some = false
	}
	for _, r := range line {
		switch {
		case quote != 0 && r == quote:
			quote = 0
		case quote == 0 && (r == '\'' || r == '"'):
			quote, some = r, true
		case quote == 0 && r == ' ':
			end()
		case quote == 0 && r == '#' && !some:
			return words
		default:
			word.WriteRune(r)
			some = true
		}
	}
	end()
	return words
}

// TestEveryFlagIsDescribed checks that each command has an example or a description,
// and each flag a usage text, for help, manual pages and completion.
func TestEveryFlagIsDescribed(t *testing.T) {
	root := newRootCommand()
	all := root.Commands()
	for len(all) > 0 {
		c := all[0]
		all = append(all[1:], c.Commands()...)
		if c.Hidden {
			continue
		}
		if c.Short == "" {
			t.Errorf("%s has no description", c.CommandPath())
		}
		c.Flags().VisitAll(func(f *pflag.Flag) {
			if f.Usage == "" && !f.Hidden {
				t.Errorf("%s --%s has no description", c.CommandPath(), f.Name)
			}
		})
	}
}
