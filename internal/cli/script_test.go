package cli

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"culvert/subnet/etcd/etcdtest"
)

// TestMain makes the scripts run this test binary as culvert.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"culvert": func() { os.Exit(Main(os.Args[1:])) }})
}

// TestScripts runs culvert from scripts, and checks its output and exit code. Each script
// has a separate prefix in a real etcd, and the command put, which writes a key under it
// as another program would.
func TestScripts(t *testing.T) {
	scripts, err := filepath.Glob("testdata/script/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	if testing.Short() { // the others start the program a hundred times, slow with the race detector
		scripts = []string{"testdata/script/usage.txtar", "testdata/script/status.txtar"}
	}
	endpoint := etcdtest.Start(t)
	testscript.Run(t, testscript.Params{
		Files: scripts,
		Setup: func(e *testscript.Env) error {
			e.Setenv("CULVERT_ETCD_ENDPOINTS", endpoint)
			e.Setenv("CULVERT_ETCD_PREFIX", "/"+filepath.Base(e.WorkDir))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"put": func(ts *testscript.TestScript, _ bool, args []string) {
			client, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
			ts.Check(err)
			defer client.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			_, err = client.Put(ctx, ts.Getenv("CULVERT_ETCD_PREFIX")+"/"+args[0], args[1])
			ts.Check(err)
		}},
	})
}
