package test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"culvert/internal/lab"
)

// TestFastPathBesideTCX attaches another program's tcx programs to the uplink and the tunnel
// device. They run before ours and see every packet: packets that they pass take the fast
// path, and packets that they drop do not arrive.
func TestFastPathBesideTCX(t *testing.T) {
	c := newCluster(t, 2)
	c.setConfig(config)
	c.startAll(fastEnds[0].flags...)
	pods := c.pods()
	n := c.Nodes[0]
	const next, drop = -1, 2 // TCX_NEXT and TCX_DROP (linux/bpf.h)
	reaches := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		_, err := pods[0].Ping(ctx, pods[0].Addr(true), pods[1].Addr(true))
		return err
	}
	for _, at := range []struct {
		device string
		attach ebpf.AttachType
	}{
		{n.Link, ebpf.AttachTCXIngress},
		{n.Link, ebpf.AttachTCXEgress},
		{"cvt.1", ebpf.AttachTCXIngress},
		{"cvt.1", ebpf.AttachTCXEgress},
	} {
		for _, verdict := range []int32{next, drop} {
			neighbour := tcx(t, n, at.device, at.attach, verdict)
			before := c.fastPath(n)
			err := reaches()
			after := c.fastPath(n)
			fast := after.Egress.Packets > before.Egress.Packets && after.Ingress.Packets > before.Ingress.Packets
			switch {
			case verdict == next && (err != nil || !fast):
				t.Errorf("%s on %s passes all packets: ping %v, fast path %t, left to the device %v", at.attach, at.device, err, fast, after.Slow)
			case verdict == drop && err == nil:
				t.Errorf("%s on %s drops all packets, but a ping was answered", at.attach, at.device)
			}
			if err := neighbour.Close(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "a ping is answered", reaches)
		}
	}
}

// tcx attaches a program that returns the verdict for all IPv4 packets and TCX_NEXT for
// others.
func tcx(t *testing.T, n *lab.Node, device string, at ebpf.AttachType, verdict int32) link.Link {
	t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "Apache-2.0",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R1, asm.R1, 16, asm.Word), // __sk_buff.protocol
			asm.Mov.Imm(asm.R0, -1),
			asm.JNE.Imm(asm.R1, unix.ETH_P_IP>>8|unix.ETH_P_IP&0xff<<8, "end"),
			asm.Mov.Imm(asm.R0, verdict),
			asm.Return().WithSymbol("end"),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	var attached link.Link
	err = n.Do(func() error {
		index, err := interfaceIndex(device)
		if err != nil {
			return err
		}
		attached, err = link.AttachTCX(link.TCXOptions{Interface: index, Program: program, Attach: at})
		return err
	})
	if errors.Is(err, ebpf.ErrNotSupported) {
		t.Skip("needs Linux 6.6")
	}
	if err != nil {
		t.Fatal(err)
	}
	return attached
}
