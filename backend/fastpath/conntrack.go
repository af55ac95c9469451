package fastpath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Messages and attributes of linux/netfilter/nfnetlink_conntrack.h, and states and
// flags of nf_conntrack_common.h and nf_conntrack_tcp.h.
const (
	ctNew = unix.NFNL_SUBSYS_CTNETLINK << 8 // IPCTNL_MSG_CT_NEW, which also changes an entry
	ctGet = ctNew | 1

	ctaTupleOrig, ctaTupleReply, ctaStatus, ctaProtoInfo = 1, 2, 3, 4
	ctaTupleIP, ctaTupleProto                            = 1, 2
	ctaIPv4Source, ctaIPv6Source                         = 1, 3 // each followed by the destination
	ctaProtoNumber, ctaSourcePort, ctaDestinationPort    = 1, 2, 3
	ctaProtoInfoTCP                                      = 1
	ctaTCPState, ctaTCPFlagsOriginal, ctaTCPFlagsReply   = 1, 4, 5

	seenReply, assured, confirmed       = 1 << 1, 1 << 2, 1 << 3
	expected, nat, adjusted, dying      = 1 << 0, 3 << 4, 1 << 6, 1 << 9
	helper, flowtable                   = 1 << 13, 3 << 14
	tcpEstablished                      = 3
	liberal                        byte = 0x08 // IP_CT_TCP_FLAG_BE_LIBERAL
)

// connection is what conntrack knows of a flow.
type connection struct {
	status          uint32
	state           uint8 // of TCP
	original, reply tuple
}

type tuple struct {
	protocol            uint8
	source, destination netip.AddrPort
}

// admissible checks that conntrack lets a flow pass without NAT and without a helper, and
// does not depend on its single packets. It makes the entry of a TCP connection tolerate that
// conntrack will not see every packet, as the kernel does for flowtables.
func admissible(asked tuple) error {
	is, err := lookUp(asked)
	if err != nil {
		return fmt.Errorf("looking it up in conntrack: %w", err)
	}
	if err := is.admissible(); err != nil || is.original.protocol != unix.IPPROTO_TCP {
		return err
	}
	if err := tolerate(asked); err != nil {
		return fmt.Errorf("changing its entry in conntrack: %w", err)
	}
	return nil
}

// conntrackAnswers returns why no flow can be looked up, or nil.
func conntrackAnswers() error {
	nobody := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 0}), 0) // RFC 5737
	if _, err := lookUp(tuple{unix.IPPROTO_UDP, nobody, nobody}); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// admissible returns why a connection cannot bypass conntrack, or nil. A TCP connection
// must be established in both directions. UDP has no such state, and its entry may lack a
// reply: rules then see each packet as a new flow's, with the same outcome.
func (c connection) admissible() error {
	const wanted = seenReply | assured | confirmed
	switch {
	case c.status&confirmed == 0, c.status&dying != 0, c.original.protocol == unix.IPPROTO_TCP && (c.status&wanted != wanted || c.state != tcpEstablished):
		return errors.New("it is not established")
	case c.status&(nat|adjusted|helper|expected|flowtable) != 0 || c.original != (tuple{c.reply.protocol, c.reply.destination, c.reply.source}):
		return errors.New("its packets are changed or read on their way (NAT, a conntrack helper, a flowtable)")
	}
	return nil
}

// encode appends the tuple as CTA_TUPLE_ORIG.
func (t tuple) encode(e *netlink.AttributeEncoder) (family byte) {
	family, at := byte(unix.AF_INET), uint16(ctaIPv4Source)
	if t.source.Addr().Is6() {
		family, at = unix.AF_INET6, ctaIPv6Source
	}
	e.Nested(ctaTupleOrig, func(e *netlink.AttributeEncoder) error {
		e.Nested(ctaTupleIP, func(e *netlink.AttributeEncoder) error {
			e.Bytes(at, t.source.Addr().AsSlice())
			e.Bytes(at+1, t.destination.Addr().AsSlice())
			return nil
		})
		e.Nested(ctaTupleProto, func(e *netlink.AttributeEncoder) error {
			e.ByteOrder = binary.BigEndian
			e.Uint8(ctaProtoNumber, t.protocol)
			e.Uint16(ctaSourcePort, t.source.Port())
			e.Uint16(ctaDestinationPort, t.destination.Port())
			return nil
		})
		return nil
	})
	return family
}

func (t *tuple) decode(d *netlink.AttributeDecoder) error {
	var source, destination netip.Addr
	var ports [2]uint16
	for d.Next() {
		switch d.Type() {
		case ctaTupleIP:
			d.Nested(func(d *netlink.AttributeDecoder) error {
				for d.Next() {
					a, _ := netip.AddrFromSlice(d.Bytes())
					switch d.Type() {
					case ctaIPv4Source, ctaIPv6Source:
						source = a
					default:
						destination = a
					}
				}
				return nil
			})
		case ctaTupleProto:
			d.Nested(func(d *netlink.AttributeDecoder) error {
				d.ByteOrder = binary.BigEndian
				for d.Next() {
					switch d.Type() {
					case ctaProtoNumber:
						t.protocol = d.Uint8()
					case ctaSourcePort:
						ports[0] = d.Uint16()
					case ctaDestinationPort:
						ports[1] = d.Uint16()
					}
				}
				return nil
			})
		}
	}
	t.source, t.destination = netip.AddrPortFrom(source, ports[0]), netip.AddrPortFrom(destination, ports[1])
	return nil
}

// lookUp reads the entry of a connection, of which the tuple is either direction.
func lookUp(t tuple) (connection, error) {
	e := netlink.NewAttributeEncoder()
	family := t.encode(e)
	answer, err := request(ctGet, unix.NLM_F_REQUEST, family, e)
	if err != nil {
		return connection{}, err
	}
	return decodeConnection(answer)
}

// decodeConnection reads the attributes of a conntrack entry.
func decodeConnection(answer []byte) (is connection, err error) {
	d, err := netlink.NewAttributeDecoder(answer)
	if err != nil {
		return is, err
	}
	d.ByteOrder = binary.BigEndian
	for d.Next() {
		switch d.Type() {
		case ctaTupleOrig:
			d.Nested(is.original.decode)
		case ctaTupleReply:
			d.Nested(is.reply.decode)
		case ctaStatus:
			is.status = d.Uint32()
		case ctaProtoInfo:
			d.Nested(func(d *netlink.AttributeDecoder) error {
				for d.Next() {
					d.Nested(func(d *netlink.AttributeDecoder) error {
						for d.Next() {
							if d.Type() == ctaTCPState {
								is.state = d.Uint8()
							}
						}
						return nil
					})
				}
				return nil
			})
		}
	}
	return is, d.Err()
}

// tolerate sets the flag in both directions, and nothing else.
func tolerate(t tuple) error {
	e := netlink.NewAttributeEncoder()
	family := t.encode(e)
	e.Nested(ctaProtoInfo, func(e *netlink.AttributeEncoder) error {
		e.Nested(ctaProtoInfoTCP, func(e *netlink.AttributeEncoder) error {
			e.Bytes(ctaTCPFlagsOriginal, []byte{liberal, liberal}) // flags and their mask
			e.Bytes(ctaTCPFlagsReply, []byte{liberal, liberal})
			return nil
		})
		return nil
	})
	_, err := request(ctNew, unix.NLM_F_REQUEST|unix.NLM_F_ACK, family, e)
	return err
}

// request sends one message to conntrack and returns the attributes of the first answer. (Package
// netlink waits for more, since the kernel marks this single answer as one of many.)
func request(kind, flags uint16, family byte, e *netlink.AttributeEncoder) ([]byte, error) {
	attributes, err := e.Encode()
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
		return nil, err
	}
	message := make([]byte, 20, 20+len(attributes)) // struct nlmsghdr and struct nfgenmsg
	binary.NativeEndian.PutUint32(message, uint32(20+len(attributes)))
	binary.NativeEndian.PutUint16(message[4:], kind)
	binary.NativeEndian.PutUint16(message[6:], flags)
	message[16] = family
	if err := unix.Sendto(fd, append(message, attributes...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	answer := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil {
		return nil, err
	}
	all, err := syscall.ParseNetlinkMessage(answer[:n])
	if err != nil || len(all) == 0 || len(all[0].Data) < 4 {
		return nil, errors.New("the kernel's answer is damaged")
	}
	if all[0].Header.Type == unix.NLMSG_ERROR {
		if code := int32(binary.NativeEndian.Uint32(all[0].Data)); code != 0 {
			return nil, unix.Errno(-code)
		}
		return nil, nil
	}
	return all[0].Data[4:], nil
}
