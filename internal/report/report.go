// Package report collects into one archive for a bug report what culvert and
// the kernel know about a node: state, configuration, kernel tables, logs,
// metrics. It removes secrets from all of it (Redactor), limits size and time,
// and needs no daemon. It changes nothing and keeps no state.
package report

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Limits of a report.
const (
	entryMost  = 2 << 20  // bytes of one file; of a larger one the end is kept
	totalMost  = 64 << 20 // bytes in all, before compression
	sourceTime = 5 * time.Second
	totalTime  = 40 * time.Second
)

// Source is one file of the archive.
type Source struct {
	Name string
	Read func(ctx context.Context) ([]byte, error)
}

// Options select the content of a report.
type Options struct {
	Name   string // of the archive's directory
	Root   string // prepended to file paths, for tests; usually empty
	RunDir string // the daemon's run directory
	PID    int    // the daemon's PID; 0 if none runs
	// CNI is the directory of the container runtime's CNI configurations.
	CNI string
	// Secrets are values to remove, in addition to those that are found.
	Secrets []string
	// First are files from the caller: the status, doctor's findings.
	First []Source
}

// Summary describes a report.
type Summary struct {
	Files   int
	Bytes   int // before compression
	Removed int // secrets
	Missing []string
	// Programs are the missing programs whose output is not in the report.
	Programs []string
}

// Write writes the archive, a gzipped tar file.
func Write(ctx context.Context, w io.Writer, o Options) (Summary, error) {
	ctx, cancel := context.WithTimeout(ctx, totalTime)
	defer cancel()
	var sum Summary
	redact := NewRedactor(append(slices.Clone(o.Secrets), o.secrets()...)...)
	zip := gzip.NewWriter(w)
	archive := tar.NewWriter(zip)
	now := time.Now()
	put := func(name string, text []byte) error {
		head := &tar.Header{Name: o.Name + "/" + name, Mode: 0o600, Size: int64(len(text)), ModTime: now, Format: tar.FormatPAX}
		if err := archive.WriteHeader(head); err != nil {
			return err
		}
		_, err := archive.Write(text)
		sum.Files++
		sum.Bytes += len(text)
		return err
	}
	for _, s := range slices.Concat(o.First, o.state(), o.configuration(), o.process(), kernel(), logs()) {
		if sum.Bytes > totalMost || ctx.Err() != nil {
			sum.Missing = append(sum.Missing, s.Name+": the report is large, or takes long, enough")
			continue
		}
		text, err := read(ctx, s)
		var program noProgram
		if errors.As(err, &program) && !slices.Contains(sum.Programs, string(program)) {
			sum.Programs = append(sum.Programs, string(program))
		}
		if err != nil {
			sum.Missing = append(sum.Missing, string(redact.Clean([]byte(fmt.Sprintf("%s: %v", s.Name, err)))))
		}
		if len(text) == 0 {
			continue
		}
		if err := put(s.Name, redact.Clean(last(text))); err != nil {
			return sum, err
		}
	}
	sum.Removed = redact.Removed
	if err := put("README.txt", []byte(o.readme(sum, now))); err != nil {
		return sum, err
	}
	return sum, errors.Join(archive.Close(), zip.Close())
}

// read calls a source, with a timeout.
func read(ctx context.Context, s Source) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, sourceTime)
	defer cancel()
	type answer struct {
		text []byte
		err  error
	}
	answers := make(chan answer, 1)
	go func() {
		text, err := s.Read(ctx)
		answers <- answer{text, err}
	}()
	select {
	case a := <-answers:
		return a.text, a.err
	case <-ctx.Done():
		return nil, fmt.Errorf("not within %s", sourceTime)
	}
}

// last returns the end of a text that exceeds entryMost, from the start of a
// line.
func last(text []byte) []byte {
	if len(text) <= entryMost {
		return text
	}
	cut := text[len(text)-entryMost:]
	if i := bytes.IndexByte(cut, '\n'); i >= 0 {
		cut = cut[i+1:]
	}
	return append(fmt.Appendf(nil, "[the first %d bytes are left out]\n", len(text)-len(cut)), cut...)
}

func (o Options) readme(s Summary, now time.Time) string {
	text := fmt.Sprintf("Report of culvert on this node, made at %s.\n\n"+
		"Passwords, tokens, keys and certificates were replaced by %s, %d times. Addresses, names of\n"+
		"nodes and interfaces, and firewall rules are not: review the report before you publish it.\n",
		now.UTC().Format(time.RFC3339), removed, s.Removed)
	if len(s.Missing) > 0 {
		text += "\nNot in it:\n  " + strings.Join(s.Missing, "\n  ") + "\n"
	}
	return text
}

func (o Options) path(p string) string { return filepath.Join(o.Root, p) }

// file is a file of this host. It is omitted if missing.
func file(name, path string) Source {
	return Source{name, func(context.Context) ([]byte, error) { return readFile(path) }}
}

func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 8*entryMost))
}

// state returns the files in the daemon's run directory.
func (o Options) state() []Source {
	var all []Source
	for _, name := range []string{"told.json", "snapshot.json", "lease.json", "underlay.json", "fenced.json", "subnet.env"} {
		all = append(all, file("state/"+name, filepath.Join(o.RunDir, name)))
	}
	return all
}

// configuration returns culvert's configuration on this host. Keys,
// certificates and kubeconfig files are never read.
func (o Options) configuration() []Source {
	var all []Source
	for _, pattern := range []string{
		"/etc/culvert/*.env", "/etc/culvert/*.conf", "/etc/culvert/*.json", "/etc/culvert/*.yaml",
		"/etc/systemd/system/culvert.service", "/etc/systemd/system/culvert.service.d/*.conf", "/usr/lib/systemd/system/culvert.service", "/lib/systemd/system/culvert.service",
		"/etc/systemd/networkd.conf", "/etc/systemd/networkd.conf.d/*.conf", "/etc/NetworkManager/conf.d/*.conf",
		"/etc/sysctl.conf", "/etc/sysctl.d/*.conf", "/etc/os-release", "/etc/resolv.conf",
		o.CNI + "/*.conf", o.CNI + "/*.conflist",
	} {
		paths, _ := filepath.Glob(o.path(pattern))
		for _, p := range paths {
			name := strings.TrimPrefix(strings.TrimPrefix(p, o.Root), "/")
			all = append(all, file("config/"+strings.ReplaceAll(name, "/", "_"), p))
		}
	}
	return all
}

// process describes how the daemon was started.
func (o Options) process() []Source {
	if o.PID == 0 {
		return nil
	}
	proc := fmt.Sprintf("/proc/%d/", o.PID)
	words := func(path string, keep func(string) bool) func(context.Context) ([]byte, error) {
		return func(context.Context) ([]byte, error) {
			text, err := os.ReadFile(path)
			var kept []string
			for _, w := range strings.Split(strings.TrimRight(string(text), "\x00"), "\x00") {
				if keep(w) {
					kept = append(kept, w)
				}
			}
			return []byte(strings.Join(kept, "\n") + "\n"), err
		}
	}
	return []Source{
		{"process/cmdline.txt", words(proc+"cmdline", func(string) bool { return true })},
		{"process/environ.txt", words(proc+"environ", func(w string) bool { return strings.HasPrefix(w, "CULVERT_") })},
		file("process/status.txt", proc+"status"),
		file("process/limits.txt", proc+"limits"),
		file("process/cgroup.txt", proc+"cgroup"),
	}
}

// logs returns systemd's journal of the daemon. The daemon's own last lines are
// among the caller's files.
func logs() []Source {
	return []Source{command("logs/journal.txt", "journalctl", "-u", "culvert", "-n", "5000", "--no-pager", "-o", "short-iso")}
}

// command is a program's output. A program that is not installed is listed as
// missing.
func command(name, program string, args ...string) Source {
	return Source{name, func(ctx context.Context) ([]byte, error) {
		path, err := exec.LookPath(program)
		if err != nil {
			return nil, noProgram(program)
		}
		cmd := exec.CommandContext(ctx, path, args...)
		var out, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &bounded{Buffer: &out}, &bounded{Buffer: &errs}
		if err := cmd.Run(); err != nil {
			return out.Bytes(), fmt.Errorf("%s: %w: %s", program, err, bytes.TrimSpace(errs.Bytes()))
		}
		return out.Bytes(), nil
	}}
}

// noProgram is the error of a source that needs a program that is not installed.
type noProgram string

func (p noProgram) Error() string { return fmt.Sprintf("there is no program %s here", string(p)) }

// bounded discards output beyond the limit for files.
type bounded struct{ *bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	if b.Len() < 8*entryMost {
		b.Buffer.Write(p[:min(len(p), 8*entryMost-b.Len())])
	}
	return len(p), nil
}
