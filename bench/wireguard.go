package bench

import (
	"context"
	"crypto/ecdh"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"culvert/internal/api"
)

// wireGuard is wireguard-go, used as a library. Unlike culvert's datapaths it
// encrypts.
type wireGuard struct {
	name   string
	device *device.Device
}

// wireGuardKey derives a node's key pair from its index, so that both ends know it.
// Such keys are not secret.
func wireGuardKey(index int) (private []byte, public []byte, err error) {
	seed := sha256.Sum256(fmt.Appendf(nil, "culvert bench wireguard-go node %d", index))
	key, err := ecdh.X25519().NewPrivateKey(seed[:])
	if err != nil {
		return nil, nil, err
	}
	return key.Bytes(), key.PublicKey().Bytes(), nil
}

func openWireGuard(p Part, log *slog.Logger) (carrier, error) {
	private, _, err := wireGuardKey(p.Index)
	if err != nil {
		return nil, err
	}
	config := fmt.Sprintf("private_key=%s\nlisten_port=%d\n", hex.EncodeToString(private), p.Port)
	for _, o := range p.others() {
		_, peer, err := wireGuardKey(o.index)
		if err != nil {
			return nil, err
		}
		config += fmt.Sprintf("public_key=%s\nallowed_ip=%s\nendpoint=%s:%d\n", hex.EncodeToString(peer), o.subnet, o.underlay, p.Port)
	}
	t, err := tun.CreateTUN(p.device(), device.DefaultMTU)
	if err != nil {
		return nil, fmt.Errorf("creating the TUN device %s: %w", p.device(), err)
	}
	w := &wireGuard{name: p.device(), device: device.NewDevice(t, conn.NewDefaultBind(), &device.Logger{
		Verbosef: device.DiscardLogf,
		Errorf:   func(format string, args ...any) { log.Error("wireguard-go", "reason", fmt.Sprintf(format, args...)) },
	})}
	err = w.device.IpcSet(config)
	if err == nil {
		err = w.device.Up()
	}
	if err == nil {
		err = tunDevice(p, 80) // device.DefaultMTU is 1420
	}
	if err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}

func (w *wireGuard) Run(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-w.device.Wait():
		return errors.New("wireguard-go stopped")
	}
}

// Status has no counters: the library does not count its system calls.
func (w *wireGuard) Status() api.Datapath {
	return api.Datapath{WireFormat: "wireguard", Kind: "userspace", Device: w.name}
}

func (w *wireGuard) Close() error {
	w.device.Close()
	return nil
}
