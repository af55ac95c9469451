package host_test

import (
	"errors"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"culvert/internal/host"
)

func TestU9OneOwnerPerNamespace(t *testing.T) {
	first := host.Owner{PID: os.Getpid(), What: "culvert run", Node: "n1", RunDir: "/run/a", Store: "x", Since: time.Now()}
	inside(t, node(t), func() error {
		own, err := host.Own(first)
		if err != nil {
			t.Fatal(err)
		}
		second := first
		second.RunDir = "/run/b"
		_, err = host.Own(second)
		owned, ok := errors.AsType[*host.OwnedError](err)
		if !ok || owned.By.PID != os.Getpid() || owned.By.Node != "n1" || owned.By.RunDir != "/run/a" {
			t.Fatalf("the second: %v", err)
		}
		if owned.By.Same(second) || !owned.By.Same(first) {
			t.Error("who is whose successor is not known")
		}
		own.Release()
		if own, err = host.Own(second); err != nil {
			t.Fatalf("after the first: %v", err)
		}
		own.Release()
		return host.MayConfigure()
	})
}

// If several start at once, exactly one becomes the owner.
func TestP10ManyAtOnce(t *testing.T) {
	n := node(t)
	for range 20 {
		var all sync.WaitGroup
		releases := make(chan func(), 4)
		for range 4 {
			all.Go(func() {
				_ = n.Do(func() error {
					if own, err := host.Own(host.Owner{What: "culvert run"}); err == nil {
						releases <- own.Release
					}
					return nil
				})
			})
		}
		all.Wait()
		if len(releases) != 1 {
			t.Fatalf("%d owners", len(releases))
		}
		(<-releases)()
	}
}

// If another program has the socket, the kernel still reports its PID.
func TestOwnerWithoutAnswer(t *testing.T) {
	inside(t, node(t), func() error {
		l, err := net.Listen("unix", "@culvert-owner")
		if err != nil {
			return err
		}
		defer l.Close()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_ = c.Close()
			}
		}()
		_, err = host.Own(host.Owner{What: "culvert run"})
		if owned, ok := errors.AsType[*host.OwnedError](err); !ok || owned.By.PID != os.Getpid() || owned.By.What != "" {
			t.Errorf("%v", err)
		}
		return nil
	})
}
