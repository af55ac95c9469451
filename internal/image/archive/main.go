// Archive writes the image of a release for several architectures into one file, without
// a container engine.
//
//	go run ./internal/image/archive -out FILE -name NAME:TAG -created SECONDS ARCH=DIRECTORY ...
//
// Each directory contains the Dockerfile and the files that it copies.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"culvert/internal/image"
)

func main() {
	out := flag.String("out", "", "file to write")
	name := flag.String("name", "", "the image's name, in full, such as docker.io/library/culvert:v1")
	created := flag.Int64("created", 0, "time stamp of the image, in seconds since 1970")
	flag.Parse()
	if err := run(*out, *name, time.Unix(*created, 0), flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "archive:", err)
		os.Exit(1)
	}
}

func run(out, name string, created time.Time, directories []string) error {
	_, tag, _ := strings.Cut(filepath.Base(name), ":")
	var images []image.Image
	for _, d := range directories {
		arch, directory, ok := strings.Cut(d, "=")
		if !ok {
			return fmt.Errorf("%q is not ARCH=DIRECTORY", d)
		}
		i, err := image.FromDockerfile(filepath.Join(directory, "Dockerfile"), name)
		if err != nil {
			return err
		}
		i.Arch, i.Created = arch, created
		i.Labels = map[string]string{
			"org.opencontainers.image.title":    "culvert",
			"org.opencontainers.image.version":  tag,
			"org.opencontainers.image.licenses": "Apache-2.0",
		}
		images = append(images, i)
	}
	if len(images) == 0 {
		return fmt.Errorf("no ARCH=DIRECTORY is given")
	}
	return image.Write(out, images...)
}
