// Package image writes container images without a container engine: one layer of
// files from this machine, as an OCI archive that `ctr images import` reads.
package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
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
	"time"
)

// Image is the content of an image FROM scratch.
type Image struct {
	Name       string            // in full, such as docker.io/library/culvert:v1
	Files      map[string]string // host path by path in the image. Symbolic links are kept
	Entrypoint []string
	Cmd        []string
	Arch       string // GOARCH; this machine's if empty
	Labels     map[string]string
	Created    time.Time
}

// FromDockerfile returns the image of a Dockerfile that only copies files into an image
// FROM scratch: those below its directory that .dockerignore does not exclude.
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
			err = errors.New("only FROM scratch, COPY without options, ENTRYPOINT and CMD are supported")
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

// copy adds a file, or a directory's content.
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

type platform struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	Variant      string `json:"variant,omitempty"`
}

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Platform    *platform         `json:"platform,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

const kind = "application/vnd.oci.image."

// archive writes an OCI image layout.
type archive struct {
	w       *tar.Writer
	written map[string]bool
}

func (a archive) blob(mediaType string, content []byte) (descriptor, error) {
	sum := fmt.Sprintf("%x", sha256.Sum256(content))
	d := descriptor{MediaType: kind + mediaType, Digest: "sha256:" + sum, Size: len(content)}
	if a.written[sum] {
		return d, nil
	}
	a.written[sum] = true
	return d, add(a.w, "blobs/sha256/"+sum, content, 0o644)
}

func (a archive) object(mediaType string, v any) (descriptor, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return descriptor{}, err
	}
	return a.blob(mediaType, text)
}

// image writes the image's layer, its configuration and its manifest.
func (a archive) image(i Image) (descriptor, error) {
	layer, err := i.layer()
	if err != nil {
		return descriptor{}, err
	}
	diff := fmt.Sprintf("sha256:%x", sha256.Sum256(layer))
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	if _, err := z.Write(layer); err != nil {
		return descriptor{}, err
	}
	if err := z.Close(); err != nil {
		return descriptor{}, err
	}
	layerBlob, err := a.blob("layer.v1.tar+gzip", packed.Bytes())
	if err != nil {
		return descriptor{}, err
	}
	is := platform{OS: "linux", Architecture: i.Arch}
	if is.Architecture == "" {
		is.Architecture = runtime.GOARCH
	}
	if is.Architecture == "arm" {
		is.Variant = "v7"
	}
	description := map[string]any{
		"os": is.OS, "architecture": is.Architecture,
		"config": map[string]any{"Entrypoint": i.Entrypoint, "Cmd": i.Cmd, "Labels": i.Labels},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []any{diff}},
	}
	if is.Variant != "" {
		description["variant"] = is.Variant
	}
	if !i.Created.IsZero() {
		description["created"] = i.Created.UTC()
	}
	config, err := a.object("config.v1+json", description)
	if err != nil {
		return descriptor{}, err
	}
	d, err := a.object("manifest.v1+json", map[string]any{
		"schemaVersion": 2, "mediaType": kind + "manifest.v1+json",
		"config": config, "layers": []any{layerBlob},
	})
	d.Platform = &is
	return d, err
}

// Write writes images of one name, each for another architecture, into a file that `ctr
// images import` reads (OCI image layout, 1.0.0). The output depends only on the images.
func Write(file string, images ...Image) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	a := archive{tar.NewWriter(f), map[string]bool{}}
	var all []descriptor
	for _, i := range images {
		d, err := a.image(i)
		if err != nil {
			return fmt.Errorf("image %s: %w", i.Name, err)
		}
		all = append(all, d)
	}
	top := all[0]
	if len(all) > 1 {
		if top, err = a.object("index.v1+json", index(all...)); err != nil {
			return err
		}
	}
	_, tag, _ := strings.Cut(path.Base(images[0].Name), ":")
	top.Annotations = map[string]string{"io.containerd.image.name": images[0].Name, "org.opencontainers.image.ref.name": tag}
	text, err := json.Marshal(index(top))
	return errors.Join(err,
		add(a.w, "index.json", text, 0o644),
		add(a.w, "oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644),
		a.w.Close(), f.Close())
}

func index(manifests ...descriptor) any {
	return map[string]any{"schemaVersion": 2, "mediaType": kind + "index.v1+json", "manifests": manifests}
}
