package test

import (
	"archive/tar"
	"errors"
	"io"
	"testing"
)

// tarred is a file of an archive.
type tarred struct {
	content []byte
	link    string // target, of a symbolic link
}

// untar reads an archive: its files by name.
func untar(t *testing.T, r io.Reader) map[string]tarred {
	t.Helper()
	files := make(map[string]tarred)
	for r := tar.NewReader(r); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files[h.Name] = tarred{content, h.Linkname}
	}
}
