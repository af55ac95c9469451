package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestWrite reads an archive of two architectures back: every digest and size is that of
// its blob, the index has a manifest for each platform, and each layer contains the files
// of its architecture.
func TestWrite(t *testing.T) {
	dir := t.TempDir()
	var images []Image
	for _, arch := range []string{"amd64", "arm"} {
		d := filepath.Join(dir, arch)
		for file, text := range map[string]string{
			"Dockerfile": "FROM scratch\nCOPY bin/a /\nCOPY bin/cni/ /cni/\nENTRYPOINT [\"/a\"]\nCMD [\"run\"]\n",
			"bin/a":      "program for " + arch, "bin/cni/left-out": "x", ".dockerignore": "*\n!bin/a\n!bin/cni\nbin/cni/left-out\n",
		} {
			if err := os.MkdirAll(filepath.Dir(filepath.Join(d, file)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(d, file), []byte(text), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Symlink("../a", filepath.Join(d, "bin/cni/bridge")); err != nil {
			t.Fatal(err)
		}
		i, err := FromDockerfile(filepath.Join(d, "Dockerfile"), "docker.io/library/culvert:v1")
		if err != nil {
			t.Fatal(err)
		}
		i.Arch, i.Created = arch, time.Unix(1e9, 0)
		images = append(images, i)
	}
	var files []map[string][]byte
	for _, name := range []string{"one.tar", "two.tar"} {
		if err := Write(filepath.Join(dir, name), images...); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, untar(t, text))
		if name == "two.tar" {
			if first, err := os.ReadFile(filepath.Join(dir, "one.tar")); err != nil || !bytes.Equal(first, text) {
				t.Errorf("the same images gave two archives that differ (%v)", err)
			}
		}
	}
	archive := files[0]
	type pointer struct {
		MediaType, Digest string
		Size              int
		Platform          platform
	}
	follow := func(p pointer, v any) []byte {
		t.Helper()
		content, ok := archive["blobs/"+strings.Replace(p.Digest, ":", "/", 1)]
		if !ok || len(content) != p.Size || fmt.Sprintf("sha256:%x", sha256.Sum256(content)) != p.Digest {
			t.Fatalf("the blob of %+v has %d bytes", p, len(content))
		}
		if v != nil {
			decode(t, content, v)
		}
		return content
	}
	var top, index struct{ Manifests []pointer }
	decode(t, archive["index.json"], &top)
	if len(top.Manifests) != 1 || top.Manifests[0].MediaType != "application/vnd.oci.image.index.v1+json" {
		t.Fatalf("index.json names %+v", top.Manifests)
	}
	follow(top.Manifests[0], &index)
	if len(index.Manifests) != 2 {
		t.Fatalf("the index names %+v", index.Manifests)
	}
	for n, want := range []platform{{"linux", "amd64", ""}, {"linux", "arm", "v7"}} {
		var manifest struct {
			Config pointer
			Layers []pointer
		}
		var config struct {
			Architecture, Variant string
			Created               time.Time
			Config                struct{ Entrypoint, Cmd []string }
			Rootfs                struct {
				DiffIDs []string `json:"diff_ids"`
			}
		}
		follow(index.Manifests[n], &manifest)
		follow(manifest.Config, &config)
		if got := index.Manifests[n].Platform; got != want || config.Architecture != want.Architecture || config.Variant != want.Variant {
			t.Errorf("manifest %d is for %+v with %+v, want %+v", n, got, config, want)
		}
		if !slices.Equal(config.Config.Entrypoint, []string{"/a"}) || !slices.Equal(config.Config.Cmd, []string{"run"}) || config.Created.Unix() != 1e9 {
			t.Errorf("the configuration is %+v", config)
		}
		z, err := gzip.NewReader(bytes.NewReader(follow(manifest.Layers[0], nil)))
		if err != nil {
			t.Fatal(err)
		}
		layer, err := io.ReadAll(z)
		if err != nil {
			t.Fatal(err)
		}
		if sum := fmt.Sprintf("sha256:%x", sha256.Sum256(layer)); !slices.Equal(config.Rootfs.DiffIDs, []string{sum}) {
			t.Errorf("the layer is %s, the configuration says %v", sum, config.Rootfs.DiffIDs)
		}
		inside := untar(t, layer)
		if got := string(inside["a"]); got != "program for "+want.Architecture || len(inside) != 2 || string(inside["cni/bridge"]) != "-> ../a" {
			t.Errorf("the layer holds %q", inside)
		}
	}
}

func decode(t *testing.T, text []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(text, v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
}

// untar returns a tar's files; a symbolic link's content is "-> " and its target.
func untar(t *testing.T, text []byte) map[string][]byte {
	t.Helper()
	files := make(map[string][]byte)
	for r := tar.NewReader(bytes.NewReader(text)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeSymlink {
			files[h.Name] = []byte("-> " + h.Linkname)
		}
	}
}
