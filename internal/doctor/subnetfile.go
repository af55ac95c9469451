package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// subnetFile checks whether the daemon can write subnet.env: with this
// process's permissions, and under its systemd unit.
func subnetFile(_ context.Context, h Host) (string, []Finding) {
	if h.SubnetFile == "" {
		return "not known", nil
	}
	dir := filepath.Dir(h.SubnetFile)
	var all []Finding
	if err := unix.Access(h.path(dir), unix.W_OK); err != nil && !errors.Is(err, fs.ErrNotExist) {
		all = append(all, bad("make it writable for the daemon, or name another place with --subnet-file", "%s cannot be written to: %v", dir, err))
	}
	if unit, bar := h.unitForbids(dir); bar {
		all = append(all, bad(fmt.Sprintf("put ReadWritePaths=%s into the [Service] section of /etc/systemd/system/culvert.service.d/subnet-file.conf, run `systemctl daemon-reload`, restart culvert", dir),
			"the unit %s does not let the daemon write to %s (ProtectSystem=strict), where --subnet-file is", unit, dir))
	}
	if len(all) > 0 {
		return "", all
	}
	return h.SubnetFile + " can be written", nil
}

// unitForbids reports whether the daemon's systemd unit prevents writing to a directory
// by ProtectSystem=strict, see systemd.exec(5). The first unit file found is used, and
// all drop-ins apply.
func (h Host) unitForbids(dir string) (unit string, forbids bool) {
	for _, at := range []string{"/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"} {
		if h.exists(at + "/culvert.service") {
			unit = at + "/culvert.service"
			break
		}
	}
	if unit == "" {
		return "", false
	}
	files := []string{unit}
	for _, at := range []string{"/usr/lib/systemd/system", "/run/systemd/system", "/etc/systemd/system"} {
		files = append(files, at+"/culvert.service.d/*.conf")
	}
	strict := false
	var writable []string
	for line := range strings.Lines(h.configuration(files...)) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if !ok {
			continue
		}
		words := strings.Fields(value)
		under := func(root string) {
			for _, w := range words {
				writable = append(writable, root+strings.TrimLeft(w, "-+"))
			}
		}
		switch key {
		case "ProtectSystem":
			strict = value == "strict"
		case "ReadWritePaths":
			if value == "" {
				writable = nil
			}
			under("")
		case "RuntimeDirectory":
			under("/run/")
		case "StateDirectory":
			under("/var/lib/")
		case "CacheDirectory":
			under("/var/cache/")
		}
	}
	within := slices.ContainsFunc(writable, func(w string) bool { return dir == w || strings.HasPrefix(dir, strings.TrimSuffix(w, "/")+"/") })
	for _, free := range []string{"/dev", "/proc", "/sys"} { // writable even with strict
		within = within || strings.HasPrefix(dir, free+"/")
	}
	if strict && !within {
		if _, err := os.Stat(h.path(unit)); err == nil {
			return unit, true
		}
	}
	return "", false
}
