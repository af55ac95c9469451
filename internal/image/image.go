// Package image writes container images without a container engine: one layer of
// files from this machine, as an OCI archive that `ctr images import` reads.
package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// Image is what an image FROM scratch consists of.
type Image struct {
	Name       string            // in full, such as docker.io/library/culvert:v1
	Files      map[string]string // path in the image: path here. Symbolic links stay such
	Entrypoint []string
	Cmd        []string
}

// FromDockerfile returns the image that a Dockerfile describes which only copies
// files into an image FROM scratch: those below its directory that .dockerignore
// leaves.
func FromDockerfile(file, name string) (Image, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return Image{}, err
	}
	i := Image{Name: name, Files: map[string]string{}}
	context := filepath.Dir(file)
	ignore, err := os.ReadFile(filepath.Join(context, ".dockerignore"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Image{}, err
	}
	patterns := strings.Fields(string(ignore))
	err = nil
	for line := range strings.Lines(strings.ReplaceAll(string(text), "\\\n", " ")) {
		line, _, _ = strings.Cut(line, "#")
		instruction, args, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch {
		case instruction == "":
		case instruction == "FROM" && args == "scratch":
		case instruction == "COPY" && !strings.HasPrefix(args, "--"):
			words := strings.Fields(args)
			for _, source := range words[:len(words)-1] {
				err = errors.Join(err, i.copy(context, source, words[len(words)-1], patterns))
			}
		case instruction == "ENTRYPOINT":
			err = json.Unmarshal([]byte(args), &i.Entrypoint)
		case instruction == "CMD":
			err = json.Unmarshal([]byte(args), &i.Cmd)
		default:
			err = errors.New("only FROM scratch, COPY without options, ENTRYPOINT and CMD are known")
		}
		if err != nil {
			return Image{}, fmt.Errorf("%s: %s: %w", file, strings.TrimSpace(line), err)
		}
	}
	return i, nil
}

// ignored reports whether the last pattern that matches a path, or a directory
// that it is in, is one without a "!".
func ignored(file string, patterns []string) bool {
	is := false
	for _, pattern := range patterns {
		keep := strings.HasPrefix(pattern, "!")
		for p := file; p != "."; p = path.Dir(p) {
			if ok, _ := path.Match(strings.TrimPrefix(pattern, "!"), p); ok {
				is = !keep
			}
		}
	}
	return is
}

// copy adds a file, or what a directory holds.
func (i Image) copy(context, source, target string, patterns []string) error {
	source = filepath.Join(context, source)
	return filepath.WalkDir(source, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if name, err := filepath.Rel(context, p); err != nil || ignored(name, patterns) {
			return err
		}
		inside, err := filepath.Rel(source, p)
		if err != nil {
			return err
		}
		to := path.Join(target, inside)
		if inside == "." && strings.HasSuffix(target, "/") {
			to = path.Join(target, filepath.Base(source))
		}
		i.Files[strings.TrimPrefix(to, "/")] = p
		return nil
	})
}

// layer returns the files as a tar.
func (i Image) layer() ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(i.Files)) {
		source := i.Files[name]
		info, err := os.Lstat(source)
		if err != nil {
			return nil, err
		}
		if info.Mode().Type() == fs.ModeSymlink {
			target, err := os.Readlink(source)
			if err != nil {
				return nil, err
			}
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}); err != nil {
				return nil, err
			}
			continue
		}
		content, err := os.ReadFile(source)
		if err != nil {
			return nil, err
		}
		if err := add(w, name, content, int64(info.Mode().Perm())); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), w.Close()
}

func add(w *tar.Writer, name string, content []byte, mode int64) error {
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(content))}); err != nil {
		return err
	}
	_, err := w.Write(content)
	return err
}

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// Write writes the image into a file (OCI image layout, 1.0.0).
func (i Image) Write(file string) error {
	layer, err := i.layer()
	if err != nil {
		return fmt.Errorf("image %s: %w", i.Name, err)
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	var failed error
	blob := func(kind string, content []byte) descriptor {
		sum := fmt.Sprintf("%x", sha256.Sum256(content))
		failed = errors.Join(failed, add(w, "blobs/sha256/"+sum, content, 0o644))
		return descriptor{MediaType: "application/vnd.oci.image." + kind, Digest: "sha256:" + sum, Size: len(content)}
	}
	object := func(v any) []byte {
		text, err := json.Marshal(v)
		failed = errors.Join(failed, err)
		return text
	}
	layerBlob := blob("layer.v1.tar", layer)
	config := blob("config.v1+json", object(map[string]any{
		"os": "linux", "architecture": runtime.GOARCH,
		"config": map[string]any{"Entrypoint": i.Entrypoint, "Cmd": i.Cmd},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []any{layerBlob.Digest}},
	}))
	manifest := blob("manifest.v1+json", object(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": config, "layers": []any{layerBlob},
	}))
	_, tag, _ := strings.Cut(path.Base(i.Name), ":")
	manifest.Annotations = map[string]string{"io.containerd.image.name": i.Name, "org.opencontainers.image.ref.name": tag}
	for _, part := range []struct {
		name    string
		content []byte
	}{
		{"index.json", object(map[string]any{"schemaVersion": 2, "manifests": []any{manifest}})},
		{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)},
	} {
		failed = errors.Join(failed, add(w, part.name, part.content, 0o644))
	}
	if err := errors.Join(failed, w.Close(), f.Close()); err != nil {
		return fmt.Errorf("image %s: %w", i.Name, err)
	}
	return nil
}
