package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/handover"
	"culvert/internal/names"
	"culvert/internal/remedy"
)

// Owner is the only process that may change culvert's objects in a network
// namespace. Devices, routes and the nftables table have fixed names, so two
// daemons would undo each other's changes.
type Owner struct {
	PID    int       `json:"pid"`
	What   string    `json:"what"` // the command, such as "culvert run"
	Node   string    `json:"node,omitempty"`
	RunDir string    `json:"run_dir,omitempty"`
	Store  string    `json:"store,omitempty"` // the store that has its leases
	Since  time.Time `json:"since"`
}

// Same reports whether both are daemons of the same node, store and run
// directory, so that one is the other's successor.
func (o Owner) Same(other Owner) bool {
	return o.What == other.What && o.Node == other.Node && o.RunDir == other.RunDir && o.Store == other.Store
}

// The lock is an abstract unix socket (unix(7), names.OwnerSocket). Its name is unique
// within a network namespace, independent of the mount namespace, and the kernel frees
// it when the process ends. A client that connects receives the Owner as JSON.

// OwnedError means that another process owns the network namespace.
type OwnedError struct {
	By  Owner // PID as the kernel reports it here; the other fields are zero if it does not answer
	UID uint32

	seen int // its PID in this PID namespace; 0 if it is in another
}

// Error implements error.
func (e *OwnedError) Error() string { return e.remedy().Error() }

// Unwrap returns the same with what to do apart from it.
func (e *OwnedError) Unwrap() error { return e.remedy() }

func (e *OwnedError) remedy() error {
	if e.By.What == "" {
		return remedy.Errorf("end it first", "the process %d of user %d holds culvert's lock of this network namespace (unix socket %s)", e.By.PID, e.UID, names.OwnerSocket)
	}
	who := fmt.Sprintf("pid %d", e.By.PID)
	if e.By.Node != "" {
		who += fmt.Sprintf(", node %s, run directory %s", e.By.Node, e.By.RunDir)
	}
	return remedy.Errorf("stop it first", "`%s` runs in this network namespace (%s), and two would undo each other's changes", e.By.What, who)
}

// Ownership is the held lock. If its descriptor was passed on, the lock
// outlives the process that took it.
type Ownership struct {
	fd   int
	text []byte // the Owner as JSON

	listener net.Listener // nil while it does not answer
	ended    chan struct{}
}

// Own makes this process the owner of its network namespace until Release or
// the end of the process. It returns *OwnedError if another process is the
// owner.
func Own(o Owner) (*Ownership, error) {
	l, err := net.Listen("unix", names.OwnerSocket)
	if errors.Is(err, unix.EADDRINUSE) {
		by, err := askOwner()
		if err != nil {
			return nil, fmt.Errorf("finding the owner of this network namespace: %w", err)
		}
		return nil, by
	}
	if err != nil {
		return nil, fmt.Errorf("taking culvert's lock of this network namespace: %w", err)
	}
	fd, err := handover.Descriptor(l.(*net.UnixListener))
	_ = l.Close()
	if err != nil {
		return nil, err
	}
	own, err := InheritOwnership(fd, o)
	if err == nil {
		err = own.Answer()
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return own, nil
}

// InheritOwnership returns the ownership whose descriptor a predecessor passed
// on. The predecessor answers clients until Answer is called.
func InheritOwnership(fd int, o Owner) (*Ownership, error) {
	text, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	return &Ownership{fd: fd, text: text}, nil
}

// Descriptor returns the descriptor to pass to a successor. The Ownership keeps
// it open.
func (o *Ownership) Descriptor() int { return o.fd }

// Answer answers clients of the lock as the owner.
func (o *Ownership) Answer() error {
	// SO_PEERCRED of a client reports the process that called listen last
	// (unix_listen).
	if err := unix.Listen(o.fd, unix.SOMAXCONN); err != nil {
		return fmt.Errorf("listening on %s: %w", names.OwnerSocket, err)
	}
	l, err := handover.Listener(o.fd)
	if err != nil {
		return err
	}
	o.listener, o.ended = l, make(chan struct{})
	go func() {
		defer close(o.ended)
		for {
			conn, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil { // out of descriptors, for example
				time.Sleep(100 * time.Millisecond)
				continue
			}
			_ = conn.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
			_, _ = conn.Write(o.text) // fits in the socket's buffer
			_ = conn.Close()
		}
	}()
	return nil
}

// Pause stops answering. Clients then wait for the successor, or for Answer.
func (o *Ownership) Pause() {
	if o.listener == nil {
		return
	}
	_ = o.listener.Close()
	<-o.ended
	o.listener = nil
}

// Release closes this process's descriptor. That frees the lock, unless a
// descriptor was passed on.
func (o *Ownership) Release() {
	o.Pause()
	_ = unix.Close(o.fd)
}

// AwaitOwn retries Own for up to most, because a predecessor may be just
// ending.
func AwaitOwn(ctx context.Context, o Owner, most time.Duration) (*Ownership, error) {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	for {
		own, err := Own(o)
		if err == nil {
			return own, nil
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// askOwner asks for the owner of the lock. The kernel provides the PID and
// user, the owner itself the rest.
func askOwner() (*OwnedError, error) {
	conn, err := net.DialTimeout("unix", names.OwnerSocket, time.Second)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return nil, err
	}
	if credErr != nil {
		return nil, credErr
	}
	owned := &OwnedError{UID: cred.Uid, seen: int(cred.Pid)}
	_ = conn.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	if json.NewDecoder(conn).Decode(&owned.By) != nil {
		owned.By = Owner{}
	}
	if cred.Pid != 0 { // 0: the process is in another PID namespace
		owned.By.PID = int(cred.Pid)
	}
	return owned, nil
}

// OwnerHere returns the owner's PID if it is in this process's PID namespace,
// otherwise 0. In a container it thus tells whether the container's own daemon
// is the owner.
func OwnerHere() (pid int, err error) {
	o, err := askOwner()
	if err != nil {
		return 0, fmt.Errorf("no daemon has culvert's lock of this network namespace: %w", err)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", o.seen)); o.seen == 0 || err != nil {
		return 0, nil
	}
	return o.seen, nil
}

// MayConfigure returns an error if this process may not configure the network
// of its namespace. It changes nothing: it tries to delete an interface that
// cannot exist, and the kernel checks the permission before it looks up the
// interface (rtnetlink_rcv_msg).
func MayConfigure() error {
	none := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: 1<<31 - 1}}
	if err := netlink.LinkDel(none); errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return remedy.Errorf("run it as root, such as with `sudo`", "culvert needs the right to configure this host's network (CAP_NET_ADMIN)")
	}
	return nil
}
