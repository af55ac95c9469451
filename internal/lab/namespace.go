package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// netnsDir is where iproute2 mounts named network namespaces.
const netnsDir = "/run/netns"

// Namespace is a named network namespace of a lab. Its methods are safe for
// concurrent use.
type Namespace struct {
	Name string // as `ip netns` shows it
	Path string // the file that it is bind-mounted on

	lab    *Lab
	mu     sync.Mutex
	keeper *keeper // started by the first Start
}

// newNamespace creates a named namespace with lo up.
func newNamespace(l *Lab, name string) (*Namespace, error) {
	ns := &Namespace{Name: name, Path: filepath.Join(netnsDir, name), lab: l}
	made := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and with it the
		// only other reference to the namespace.
		runtime.LockOSThread()
		made <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			f, err := os.OpenFile(ns.Path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
			if err != nil {
				return err
			}
			_ = f.Close()
			self := fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
			if err := unix.Mount(self, ns.Path, "", unix.MS_BIND, ""); err != nil {
				_ = os.Remove(ns.Path)
				return err
			}
			return nil
		}()
	}()
	if err := <-made; err != nil {
		return nil, fmt.Errorf("creating network namespace %s: %w", name, err)
	}
	err := ns.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	// A lab's addresses are unique, so duplicate address detection would only
	// delay them. A new namespace may inherit settings from the host's: set them,
	// so that every lab starts the same.
	for _, s := range [][2]string{
		{"net/ipv4/ip_forward", "0"},
		{"net/ipv6/conf/all/forwarding", "0"},
		{"net/ipv6/conf/all/accept_dad", "0"},
		{"net/ipv6/conf/default/accept_dad", "0"},
		{"net/ipv6/conf/all/accept_ra", "0"},
		{"net/ipv6/conf/default/accept_ra", "0"},
	} {
		if err == nil {
			err = ns.SetSysctl(s[0], s[1])
		}
		if errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(s[0], "net/ipv6") {
			err = nil // a kernel without IPv6
		}
	}
	if err == nil && l.options.InOrder {
		// Links that are created from now on take it over. Older kernels lack it, and a user
		// namespace may not set it.
		mask := strconv.FormatUint(1<<min(runtime.NumCPU(), 32)-1, 16)
		if err = ns.SetSysctl("net/core/rps_default_mask", mask); errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			err = nil
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("setting up network namespace %s: %w", name, err), deleteNamespace(name))
	}
	return ns, nil
}

// AddNamespace creates a namespace named <lab's ID>-<name> without links. Delete or
// Lab.Close removes it.
func (l *Lab) AddNamespace(name string) (*Namespace, error) {
	ns, err := newNamespace(l, l.ID+"-"+name)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.extra = append(l.extra, ns)
	return ns, nil
}

// Delete stops the namespace's processes and removes it.
func (n *Namespace) Delete() error {
	err := stopAll(processesIn([]string{n.Name}))
	n.endKeeper()
	if err := errors.Join(err, deleteNamespace(n.Name)); err != nil {
		return fmt.Errorf("deleting network namespace %s: %w", n.Name, err)
	}
	n.lab.mu.Lock()
	defer n.lab.mu.Unlock()
	n.lab.extra = slices.DeleteFunc(n.lab.extra, func(o *Namespace) bool { return o == n })
	return nil
}

// deleteNamespace unmounts and removes the name. The kernel destroys the namespace
// when its last process and socket are gone. A missing name is not an error.
func deleteNamespace(name string) error {
	path := filepath.Join(netnsDir, name)
	for {
		err := unix.Unmount(path, unix.MNT_DETACH)
		if err == nil {
			continue // it may be mounted more than once
		}
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break
		}
		return fmt.Errorf("unmounting network namespace %s: %w", name, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing network namespace %s: %w", name, err)
	}
	return nil
}

// Do calls fn on an operating system thread inside the namespace, and returns its
// error. Sockets and files of /proc/sys/net that fn opens and processes that it
// starts belong to the namespace and stay usable after Do; goroutines that fn
// starts run outside it. fn must not exit its goroutine, as testing.T.FailNow does.
func (n *Namespace) Do(fn func() error) error {
	target, err := netns.GetFromPath(n.Path)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", n.Name, err)
	}
	defer target.Close()

	result := make(chan error, 1)
	go func() {
		returned := false
		var err error
		defer func() {
			if !returned && err == nil {
				err = errors.New("the function exited its goroutine")
			}
			result <- err
		}()
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			runtime.UnlockOSThread()
			return
		}
		defer home.Close()
		if err = netns.Set(target); err != nil {
			err = fmt.Errorf("entering network namespace %s: %w", n.Name, err)
			runtime.UnlockOSThread()
			return
		}
		err = fn()
		returned = true
		if netns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
		// Else the goroutine exits while locked, and Go ends the thread.
	}()
	return <-result
}

// SetSysctl sets a network setting of the namespace; key is a path below
// /proc/sys such as "net/ipv4/ip_forward".
func (n *Namespace) SetSysctl(key, value string) error {
	err := n.Do(func() error { return os.WriteFile(filepath.Join("/proc/sys", key), []byte(value), 0) })
	if err != nil {
		return fmt.Errorf("setting %s to %s in %s: %w", key, value, n.Name, err)
	}
	return nil
}

// Sysctl returns a network setting of the namespace.
func (n *Namespace) Sysctl(key string) (string, error) {
	var text []byte
	err := n.Do(func() (err error) {
		text, err = os.ReadFile(filepath.Join("/proc/sys", key))
		return err
	})
	return strings.TrimSpace(string(text)), err
}

// Dial connects from inside the namespace. The address must be an IP address: a
// name would be resolved on threads outside it. The caller owns the connection.
func (n *Namespace) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return n.DialWith(ctx, net.Dialer{}, network, address)
}

// DialWith is Dial with a Dialer's settings, such as Control or LocalAddr.
func (n *Namespace) DialWith(ctx context.Context, d net.Dialer, network, address string) (net.Conn, error) {
	if err := literal(address); err != nil {
		return nil, err
	}
	d.SetMultipathTCP(false)
	var c net.Conn
	err := n.Do(func() (err error) {
		c, err = d.DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// Listen opens a listening socket inside the namespace. The caller owns it.
func (n *Namespace) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	if err := literal(address); err != nil {
		return nil, err
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	var l net.Listener
	err := n.Do(func() (err error) {
		l, err = lc.Listen(ctx, network, address)
		return err
	})
	return l, err
}

// ListenPacket opens a packet socket inside the namespace. The caller owns it.
func (n *Namespace) ListenPacket(ctx context.Context, network, address string) (net.PacketConn, error) {
	var lc net.ListenConfig
	var c net.PacketConn
	err := n.Do(func() (err error) {
		c, err = lc.ListenPacket(ctx, network, address)
		return err
	})
	return c, err
}

// literal returns an error if the address has a host name.
func literal(address string) error {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	if i := strings.IndexByte(host, '%'); i >= 0 {
		host = host[:i]
	}
	if host != "" && net.ParseIP(host) == nil {
		return fmt.Errorf("%q is a name, not an IP address", host)
	}
	return nil
}

// keeper is a thread that stays inside a namespace and starts its processes: the
// kernel sends the parent-death signal when the thread that started them exits,
// not when the process does.
type keeper struct {
	work chan func()
	done chan struct{}
}

// onKeeper runs fn on the namespace's keeper, which it starts if there is none.
func (n *Namespace) onKeeper(fn func()) error {
	n.mu.Lock()
	if n.keeper == nil {
		k := &keeper{work: make(chan func()), done: make(chan struct{})}
		entered := make(chan error, 1)
		go func() {
			defer close(k.done)
			runtime.LockOSThread() // never unlocked
			target, err := netns.GetFromPath(n.Path)
			if err == nil {
				err = netns.Set(target)
				_ = target.Close()
			}
			entered <- err
			if err != nil {
				return
			}
			for fn := range k.work {
				fn()
			}
		}()
		if err := <-entered; err != nil {
			n.mu.Unlock()
			return fmt.Errorf("entering network namespace %s: %w", n.Name, err)
		}
		n.keeper = k
	}
	k := n.keeper
	n.mu.Unlock()
	ran := make(chan struct{})
	k.work <- func() { fn(); close(ran) }
	<-ran
	return nil
}

// endKeeper ends the thread. The kernel then kills the remaining processes that it
// started with a parent-death signal, so stop them first.
func (n *Namespace) endKeeper() {
	n.mu.Lock()
	k := n.keeper
	n.keeper = nil
	n.mu.Unlock()
	if k != nil {
		close(k.work)
		<-k.done
	}
}
