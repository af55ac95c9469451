package etcdtest

import (
	"context"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// Password is that of the user culvert after Secure.
const Password = "correct-horse-battery"

// Secure enables authentication with a user whose role covers only one prefix.
func Secure(t testing.TB, endpoint string, dial ...grpc.DialOption) {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, DialOptions: dial, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	const prefix = "/coreos.com/network/"
	for _, step := range []func() error{
		func() error { _, err := c.RoleAdd(ctx, "culvert"); return err },
		func() error {
			_, err := c.RoleGrantPermission(ctx, "culvert", prefix, clientv3.GetPrefixRangeEnd(prefix), clientv3.PermissionType(clientv3.PermReadWrite))
			return err
		},
		func() error { _, err := c.UserAdd(ctx, "culvert", Password); return err },
		func() error { _, err := c.UserGrantRole(ctx, "culvert", "culvert"); return err },
		func() error { _, err := c.UserAdd(ctx, "root", "root"); return err },
		func() error { _, err := c.UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := c.AuthEnable(ctx); return err },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
}
