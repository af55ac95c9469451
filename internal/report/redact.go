package report

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// removed replaces a secret.
const removed = "[removed]"

// Redactor removes secrets from texts: known values, in several encodings, and
// text that looks like a secret.
type Redactor struct {
	known   [][]byte // longest first
	Removed int
}

// shortest is the minimum length of a known value: shorter ones would match
// inside unrelated words.
const shortest = 4

// NewRedactor returns a Redactor for the given secrets.
func NewRedactor(secrets ...string) *Redactor {
	r := &Redactor{}
	for _, s := range secrets {
		s = strings.TrimSpace(s)
		if len(s) < shortest {
			continue
		}
		for _, form := range forms(s) {
			if len(form) >= shortest && !slices.ContainsFunc(r.known, func(k []byte) bool { return string(k) == form }) {
				r.known = append(r.known, []byte(form))
			}
		}
	}
	slices.SortStableFunc(r.known, func(a, b []byte) int { return len(b) - len(a) })
	return r
}

// forms returns the encodings of a secret: plain, URL, JSON string,
// hexadecimal, and base64 at each of the three offsets within a longer text,
// such as user:password.
func forms(s string) []string {
	all := []string{s, url.QueryEscape(s), url.PathEscape(s), strings.Trim(fmt.Sprintf("%q", s), `"`), hex.EncodeToString([]byte(s))}
	for offset := range 3 {
		// The first and last characters also encode adjacent bits.
		text := strings.Repeat("x", offset) + s
		for _, e := range []*base64.Encoding{base64.StdEncoding, base64.URLEncoding} {
			code := e.EncodeToString([]byte(text))
			from := (offset*8 + 5) / 6
			to := len(text) * 8 / 6
			if to-from >= 2*shortest {
				all = append(all, code[from:to])
			}
		}
	}
	return all
}

// Patterns of secrets. The groups are the secret, or the text before it.
var (
	pem    = regexp.MustCompile(`(?s)-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|\z)`)
	pem64  = regexp.MustCompile(`LS0tLS1CRUdJTi[A-Za-z0-9+/=_-]*`) // "-----BEGIN" in base64
	jwt    = regexp.MustCompile(`eyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]*`)
	bearer = regexp.MustCompile(`(?i)\b((?:bearer|basic)\s+)[A-Za-z0-9+/=._~-]{8,}`)
	users  = regexp.MustCompile(`([a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s"'@]+@`)
	// named matches a key, a separator and a secret value: PASSWORD=x, "token":
	// "x", --etcd-password x. A path is not a secret: --etcd-password-file
	// /etc/x.
	named = regexp.MustCompile(`(?i)((?:[A-Z0-9]+[_.-])*(?:password|passwd|passphrase|token|secret|api[_-]?key|private[_-]?key|client-key-data|client-certificate-data|certificate-authority-data|psk)(?:[_.-]?(?:data|value|id))?["']?(?:\s*[:=]\s*|[ \t\n]+))("(?:[^"\\]|\\.)*"|'[^']*'|[^\s"',;}]+)`)
)

// Clean returns the text with secrets replaced.
func (r *Redactor) Clean(text []byte) []byte {
	text = r.replace(pem, text, func([]byte) []byte { return []byte(removed) })
	for _, k := range r.known {
		if n := bytes.Count(text, k); n > 0 {
			r.Removed += n
			text = bytes.ReplaceAll(text, k, []byte(removed))
		}
	}
	for _, re := range []*regexp.Regexp{pem64, jwt} {
		text = r.replace(re, text, func([]byte) []byte { return []byte(removed) })
	}
	for _, re := range []*regexp.Regexp{bearer, users} {
		text = r.replace(re, text, func(m []byte) []byte {
			tail := ""
			if re == users {
				tail = "@"
			}
			return append(bytes.Clone(re.FindSubmatch(m)[1]), removed+tail...)
		})
	}
	return r.replace(named, text, func(m []byte) []byte {
		parts := named.FindSubmatch(m)
		value := bytes.Trim(parts[2], `"'`)
		if len(value) == 0 || bytes.Equal(value, []byte(removed)) || !assigned(parts[1]) || bytes.HasPrefix(value, []byte("/")) {
			return nil
		}
		quote := ""
		if parts[2][0] == '"' || parts[2][0] == '\'' {
			quote = string(parts[2][0])
		}
		return append(bytes.Clone(parts[1]), quote+removed+quote...)
	})
}

// assigned reports whether the text before a value assigns it, with a sign or
// as a command-line flag, unlike in a sentence.
func assigned(word []byte) bool {
	return bytes.ContainsAny(word, ":=") || bytes.HasPrefix(word, []byte("etcd-")) || bytes.HasPrefix(word, []byte("-"))
}

// replace replaces the matches for which with does not return nil.
func (r *Redactor) replace(re *regexp.Regexp, text []byte, with func([]byte) []byte) []byte {
	return re.ReplaceAllFunc(text, func(m []byte) []byte {
		if got := with(m); got != nil {
			r.Removed++
			return got
		}
		return m
	})
}

// secretFlag matches flags and variables whose value is a secret.
var secretFlag = regexp.MustCompile(`(?i)(?:password|passwd|token|secret)$`)

// secretFile matches those whose value is the path of a file with a secret.
var secretFile = regexp.MustCompile(`(?i)(?:password|token|secret|key)[-_]?file$`)

// secrets returns the secrets in the daemon's process and configuration.
func (o Options) secrets() []string {
	var all []string
	note := func(name, value string) {
		value = strings.Trim(value, `"'`)
		switch {
		case secretFlag.MatchString(name):
			all = append(all, value)
		case secretFile.MatchString(name) && strings.HasPrefix(value, "/"):
			if text, err := readFile(o.path(value)); err == nil && len(text) < 64<<10 {
				all = append(all, string(text))
				for line := range strings.Lines(string(text)) {
					if line = strings.TrimSpace(line); len(line) >= 16 { // the lines of a key, individually
						all = append(all, line)
					}
				}
			}
		}
	}
	variables := func(text string) {
		for line := range strings.Lines(text) {
			line = strings.TrimSpace(line)
			line = strings.Trim(strings.TrimPrefix(line, "Environment="), `"'`)
			if name, value, ok := strings.Cut(line, "="); ok {
				note(strings.TrimSpace(name), strings.TrimSpace(value))
			}
		}
	}
	arguments := func(words []string) {
		for i, w := range words {
			name, value, ok := strings.Cut(strings.TrimLeft(w, "-"), "=")
			if !ok && i+1 < len(words) {
				value = words[i+1]
			}
			if strings.HasPrefix(w, "-") {
				note(name, value)
			}
		}
	}
	if o.PID != 0 {
		env, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", o.PID))
		variables(strings.ReplaceAll(string(env), "\x00", "\n"))
		args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", o.PID))
		arguments(strings.Split(string(args), "\x00"))
	}
	for _, pattern := range []string{"/etc/culvert/*.env", "/etc/systemd/system/culvert.service", "/etc/systemd/system/culvert.service.d/*.conf", "/usr/lib/systemd/system/culvert.service"} {
		paths, _ := filepath.Glob(o.path(pattern))
		for _, p := range paths {
			text, _ := readFile(p)
			variables(string(text))
			for line := range strings.Lines(string(text)) {
				arguments(strings.Fields(line))
			}
		}
	}
	return all
}
