package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// binaryFiles are the programs that AddPod needs, relative to the directory of
// culvert's programs.
var binaryFiles = []string{"culvert-cni", "cni/bridge", "cni/host-local"}

// FindBin returns the directory of culvert's programs: $CULVERT_BIN, else the
// running program's directory, else bin/ of the source tree that the working
// directory is in, which is the case in tests.
func FindBin() (string, error) {
	if dir := os.Getenv("CULVERT_BIN"); dir != "" {
		if dir, err := filepath.Abs(dir); err == nil {
			return dir, checkBin(dir)
		}
	}
	if self, err := os.Executable(); err == nil {
		if dir := filepath.Dir(self); checkBin(dir) == nil {
			return dir, nil
		}
	}
	root, err := moduleRoot()
	if err != nil {
		return "", fmt.Errorf("looking for culvert's programs: %w (set CULVERT_BIN to their directory)", err)
	}
	dir := filepath.Join(root, "bin")
	return dir, checkBin(dir)
}

func checkBin(dir string) error {
	for _, name := range binaryFiles {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("%s does not exist: run make first", filepath.Join(dir, name))
		}
	}
	return nil
}

// moduleRoot walks up from the working directory to culvert's go.mod.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		text, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && strings.HasPrefix(string(text), "module culvert\n") {
			return dir, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", errors.New("the working directory is not in culvert's source tree")
		}
		dir = up
	}
}
