package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/rogpeppe/go-internal/txtar"

	"culvert/internal/fuzzloop"
	"culvert/internal/statefile"
)

func TestDelegateConfiguration(t *testing.T) {
	files, err := filepath.Glob("testdata/delegate/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			a, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			part := map[string][]byte{}
			for _, f := range a.Files {
				part[f.Name] = f.Data
			}
			n, err := ParseNetConf(part["netconf"], DefaultsFor("culvert-cni"))
			if err != nil {
				t.Fatal(err)
			}
			env, err := ParseSubnetEnv(part["subnet.env"])
			if err != nil {
				t.Fatal(err)
			}
			got, err := n.Delegate(env)
			if err != nil {
				t.Fatal(err)
			}
			// Sort the keys at every depth for the comparison.
			var sorted any
			d := json.NewDecoder(bytes.NewReader(got))
			d.UseNumber()
			if err := d.Decode(&sorted); err != nil {
				t.Fatal(err)
			}
			text, err := json.MarshalIndent(sorted, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			if string(text)+"\n" != string(part["delegate"]) {
				t.Errorf("the delegate gets\n%s\nwant\n%s", text, part["delegate"])
			}
			again, err := n.Delegate(env)
			if err != nil || !bytes.Equal(again, got) {
				t.Errorf("not deterministic: %s, %v", again, err)
			}
		})
	}
}

func TestNetConfDefaults(t *testing.T) {
	for argv0, want := range map[string]Defaults{
		"/opt/cni/bin/culvert-cni": {SubnetFile: "/run/culvert/subnet.env", DataDir: "/var/lib/cni/culvert"},
		"/opt/cni/bin/flannel":     {SubnetFile: "/run/flannel/subnet.env", DataDir: "/var/lib/cni/flannel", RunDir: "/run/culvert"},
		"flannel":                  {SubnetFile: "/run/flannel/subnet.env", DataDir: "/var/lib/cni/flannel", RunDir: "/run/culvert"},
	} {
		n, err := ParseNetConf([]byte(`{"name":"n"}`), DefaultsFor(argv0))
		if err != nil {
			t.Fatal(err)
		}
		if got := (Defaults{n.SubnetFile, n.DataDir, n.RunDir}); got != want {
			t.Errorf("%s uses %+v, want %+v", argv0, got, want)
		}
	}
	n, err := ParseNetConf([]byte(`{"name":"n","subnetFile":"/a/b","dataDir":"/c"}`), DefaultsFor("x"))
	if err != nil || n.SubnetFile != "/a/b" || n.DataDir != "/c" {
		t.Errorf("configured paths are read as %q, %q: %v", n.SubnetFile, n.DataDir, err)
	}
}

func TestNetConfRefuses(t *testing.T) {
	for text, says := range map[string]string{
		`{`:                                    "reading the network configuration",
		`[]`:                                   "reading the network configuration",
		`{"delegate":{"name":"x"}}`:            `must not have the key "name"`,
		`{"delegate":{"ipam":{}}}`:             `must not have the key "ipam"`,
		`{"delegate":{"type":7}}`:              "not the name of a plugin: 7",
		`{"delegate":{"type":""}}`:             "not the name of a plugin",
		`{"delegate":{"type":".."}}`:           "a plugin's name",
		`{"delegate":{"type":"../../bin/sh"}}`: "no slashes",
		`{"ipam":{"type":"a/b"}}`:              "no slashes",
		`{"subnetFile":"subnet.env"}`:          "not an absolute path",
		`{"runDir":"run"}`:                     "not an absolute path",
		`{"dataDir":""}`:                       "not an absolute path",
	} {
		_, err := ParseNetConf([]byte(text), DefaultsFor("culvert-cni"))
		var e *types.Error
		if !errors.As(err, &e) || !strings.Contains(err.Error(), says) ||
			e.Code != types.ErrInvalidNetworkConfig && e.Code != types.ErrDecodingFailure {
			t.Errorf("%s: %v, want %q", text, err, says)
		}
	}
	for _, routes := range []string{`{}`, `[7]`, `[{"dst":"10.0.0.0"}]`} {
		n, err := ParseNetConf([]byte(`{"ipam":{"routes":`+routes+`}}`), DefaultsFor("x"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.Delegate(dualStack); err == nil || !strings.Contains(err.Error(), "routes") {
			t.Errorf("routes %s: %v", routes, err)
		}
	}
}

func TestState(t *testing.T) {
	s := state{filepath.Join(t.TempDir(), "a", "b")}
	eth0, eth1 := Attachment{"c1", "eth0"}, Attachment{"c1", "eth1"}
	if _, err := s.load(eth0); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("loading a missing record: %v", err)
	}
	if err := s.forget(eth0); err != nil {
		t.Errorf("removing a missing record: %v", err)
	}
	saved := record{Attachment: eth0, Network: "n", Netns: "4:5", Boot: "b", Delegate: json.RawMessage(`{"type":"bridge"}`)}
	other := saved
	other.Attachment, other.Delegate = eth1, json.RawMessage(`{"type":"ptp"}`)
	for _, r := range []record{saved, other} {
		if err := s.save(r); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []record{saved, other} {
		if got, err := s.load(want.Attachment); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("loaded %+v, want %+v: %v", got, want, err)
		}
	}
	if err := s.forget(eth0); err != nil {
		t.Error(err)
	}
	if _, err := s.load(eth0); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after removal: %v", err)
	}
	if _, err := s.load(eth1); err != nil {
		t.Errorf("removing one record removed the other: %v", err)
	}

	for _, text := range []string{"", "{", "null", "[]", `{"containerID":"c2","ifname":"eth1","delegate":{}}`, `{"containerID":"c1","ifname":"eth1"}`} {
		if err := os.WriteFile(s.path(eth1), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.load(eth1); !errors.Is(err, errDamaged) {
			t.Errorf("loading %q: %v", text, err)
		}
	}

	// flannel's record: the configuration, in a file named after the container.
	if err := os.WriteFile(s.flannelPath(eth0), []byte(`{"type":"bridge","name":"cbr0"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := s.load(eth0); err != nil || string(got.Delegate) != `{"type":"bridge","name":"cbr0"}` {
		t.Errorf("flannel's record loads as %+v: %v", got, err)
	}
	if err := s.forget(eth0); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(s.flannelPath(eth0)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("flannel's record was not removed: %v", err)
	}
}

// An ADD that was stopped between writing its record and renaming it can go on,
// although another ADD releases unused addresses meanwhile. GC, which holds the
// exclusive lock, removes what a killed ADD left.
func TestUnfinishedRecords(t *testing.T) {
	n, err := ParseNetConf([]byte(`{"cniVersion":"1.1.0","name":"n","ipam":{"type":"static"}}`), Defaults{SubnetFile: "/nonexistent", DataDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	s := state{n.DataDir}
	file := statefile.Temporary(s.path(Attachment{"c1", "eth0"}))
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := time.Now().Add(-time.Hour)
	if err := os.Chtimes(file, before, before); err != nil {
		t.Fatal(err)
	}
	if _, err := n.reclaim(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Errorf("after another ADD's reclaim: %v", err)
	}
	l, err := s.takeAttachment(Attachment{"c1", "eth0"}, 0) // the stopped ADD has it
	if err != nil {
		t.Fatal(err)
	}
	s.removeOldUnfinished()
	if _, err := os.Stat(file); err != nil {
		t.Errorf("after another ADD: %v", err)
	}
	s.removeUnfinished()
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after GC: %v", err)
	}
	l.release()

	// With a runtime that never calls GC, the next ADD removes what a killed one left.
	recent := statefile.Temporary(s.path(Attachment{"c2", "eth0"}))
	for _, path := range []string{file, recent} {
		if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chtimes(file, before, before); err != nil {
		t.Fatal(err)
	}
	s.removeOldUnfinished()
	if got := s.unfinished(); len(got) != 1 || got[0] != filepath.Base(recent) {
		t.Errorf("the next ADD leaves %v, not only the recent %s", got, filepath.Base(recent))
	}
}

// After a reboot a container has an old record until its ADD replaces it. A release of
// unused addresses that has read the old record must neither interfere with that ADD
// nor undo it.
func TestReleaseDuringADD(t *testing.T) {
	s := state{t.TempDir()}
	a := Attachment{"c1", "eth0"}
	old := record{Attachment: a, Boot: "an earlier one", Delegate: json.RawMessage(`{"type":"never-called"}`)}
	leftover := func(r record) bool { return r.leftover("this one", nil) }
	if err := s.save(old); err != nil {
		t.Fatal(err)
	}
	adding, err := s.takeAttachment(a, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.takeAttachment(a, 0); !errors.Is(err, errLocked) {
		t.Errorf("two have the lock: %v", err)
	}
	if other, err := s.takeAttachment(Attachment{"c1", "eth1"}, 0); err != nil {
		t.Errorf("another attachment is locked too: %v", err)
	} else {
		other.release()
	}
	if released, err := s.releaseIf(t.Context(), a, leftover); released || err != nil {
		t.Errorf("while the ADD is in progress: %t, %v", released, err)
	}
	now := old
	now.Boot = "this one"
	if err := s.save(now); err != nil {
		t.Fatal(err)
	}
	adding.release()
	if released, err := s.releaseIf(t.Context(), a, leftover); released || err != nil {
		t.Errorf("after the ADD: %t, %v", released, err)
	}
	if r, err := s.load(a); err != nil || r.Boot != now.Boot {
		t.Errorf("the ADD's record is %+v, %v", r, err)
	}
	// Without an ADD, the old one goes: here it fails at the delegate that is missing.
	if err := s.save(old); err != nil {
		t.Fatal(err)
	}
	if _, err := s.releaseIf(t.Context(), a, leftover); err == nil || !strings.Contains(err.Error(), "never-called") {
		t.Errorf("an old record: %v", err)
	}
}

func TestAttachmentNames(t *testing.T) {
	for _, a := range []Attachment{
		{"", "eth0"},
		{"../c", "eth0"},
		{".hidden", "eth0"},
		{"a/b", "eth0"},
		{"a:b", "eth0"},
		{"a\x00b", "eth0"},
		{strings.Repeat("x", maxContainerID+1), "eth0"},
		{"c", ""},
		{"c", ".."},
		{"c", "a/b"},
		{"c", "a:b"},
		{"c", "sixteen-letters!"},
	} {
		if a.validate() == nil {
			t.Errorf("%+v was accepted", a)
		}
	}
	long := Attachment{strings.Repeat("x", maxContainerID), "fifteen-letters"}
	if err := long.validate(); err != nil {
		t.Fatal(err)
	}
	s := state{t.TempDir()}
	if err := s.save(record{Attachment: long, Delegate: json.RawMessage(`{}`)}); err != nil {
		t.Errorf("the longest names: %v", err)
	}
}

// FuzzNetConf parses arbitrary network configurations: each is rejected with an error
// code of the specification, or gives a delegate's configuration with all required keys.
func FuzzNetConf(std *testing.F) {
	f := fuzzloop.Of(std)
	for _, text := range []string{
		`{"name":"n","cniVersion":"1.0.0"}`,
		`{"name":"n","subnetFile":"/a","dataDir":"/b","delegate":{"type":"bridge","mtu":9},"ipam":{"type":"host-local","routes":[{"dst":"10.0.0.0/8"}]}}`,
		`{"ipam":{"routes":{}},"runtimeConfig":{"ips":["1.2.3.4/8"]},"prevResult":{}}`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		n, err := ParseNetConf(text, DefaultsFor("culvert-cni"))
		if err == nil {
			var conf []byte
			if conf, err = n.Delegate(dualStack); err == nil {
				var made struct {
					Name, Type string
					IPAM       struct{ Ranges [][]json.RawMessage }
				}
				if err := json.Unmarshal(conf, &made); err != nil {
					t.Fatalf("%s: %v", conf, err)
				}
				if made.Name != n.Name || made.Type == "" || strings.ContainsRune(made.Type, '/') || len(made.IPAM.Ranges) != 2 {
					t.Errorf("%s makes %s", text, conf)
				}
			}
		}
		var e *types.Error
		if err != nil && !errors.As(err, &e) {
			t.Errorf("%s: %v is no error of CNI's", text, err)
		}
	})
}
