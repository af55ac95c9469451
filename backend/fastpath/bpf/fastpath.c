// SPDX-License-Identifier: Apache-2.0
//
// The fast path of VXLAN and IPIP, as tc programs (tc-bpf(8)). The tunnel device is the
// kernel's vxlan or ipip device, or the TUN device of the userspace datapath ("the device"
// below, too).
//
//	culvert_out   egress of the tunnel device: encapsulates, and sends to the uplink
//	culvert_in    ingress of the uplink: checks, decapsulates, and hands the packet to
//	              the tunnel device as received there
//	culvert_join  far end of the pair of veth whose GRO joins the segments of bulk flows:
//	              hands what it has joined to the tunnel device
//
// The bytes on the wire are those of the kernel's vxlan device (drivers/net/vxlan,
// net/ipv4/ip_tunnel_core.c). A program never drops a packet: what it cannot or
// should not carry goes on to the kernel's device, unchanged, and is judged there.
// So a reason below says why a packet took the slow path, not that it was lost.
//
// `make bpf` compiles this file, and a test compares the result with what is committed.

#include <linux/types.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define inline_always static inline __attribute__((always_inline))
#define word16(x) bpf_htons(x)

// Numbers of the counters map. Go has the same list (counters.go).
enum counter {
	OUT_PACKETS, // segments, as on the wire
	OUT_BYTES,   // of inner packets
	OUT_FRAMES,
	IN_PACKETS,
	IN_BYTES,
	IN_FRAMES,
	IN_JOINED, // frames of IN_FRAMES that went through the pair of veth
	OUT_SHORT, // frames of OUT_FRAMES that went the short way from pod to pod
	IN_SHORT,  // of IN_FRAMES

	SLOW_OUT_PEER,     // the Ethernet destination is no peer: broadcast, or not in the map yet
	SLOW_OUT_PROTOCOL, // not the device's IP version, or with a VLAN tag
	SLOW_OUT_LENGTH,   // too long for the path, or the lengths contradict each other
	SLOW_OUT_CHECKSUM, // the outer checksum cannot be told from the headers
	SLOW_OUT_SEGMENTS, // a GSO frame that cannot bear a right outer checksum
	SLOW_OUT_HASH,     // the kernel finds no flow hash
	SLOW_OUT_ROOM,     // the kernel refuses to make room: encapsulated already, or an old kernel
	SLOW_OUT_FLOW,     // the flow has had packets that were left to the userspace datapath

	SLOW_IN_OPTIONS,     // outer IP options, extension headers, or a bad outer header checksum
	SLOW_IN_FRAGMENT,    // of the outer packet
	SLOW_IN_LENGTH,      // the lengths contradict each other: padding, or datagrams that UDP GRO joined
	SLOW_IN_HEADER,      // VXLAN flags, VNI, inner Ethernet addresses or type
	SLOW_IN_SOURCE,      // the outer and inner source are no pair: a stranger, or not in the map yet
	SLOW_IN_DESTINATION, // not in this node's subnet
	SLOW_IN_ECN,         // congestion marked outside, not understood inside (RFC 6040)
	SLOW_IN_CHECKSUM,    // the outer checksum is neither verified nor can be
	SLOW_IN_SEGMENTS,    // a GSO frame: the network has joined it, or did not cut it
	SLOW_IN_FLOW,        // the flow has had packets that were left to the device: none is to overtake them
	SLOW_IN_ROOM,        // the kernel refuses to take the headers off

	COUNTERS,
};

#define MOST_LENGTHS 8

struct address {
	__be32 word[4]; // IPv4: the first, and zeros
};

// The tunnel of one address family, inner and outer alike.
struct tunnel {
	__u32 device; // interface indexes
	__u32 uplink;
	__u32 joiner; // near end of the pair of veth; 0: nothing is to be joined
	__u32 queue;  // far end
	__u32 mtu;    // of the uplink
	__be32 vni;   // in the upper 24 bits
	__be16 port;
	__u16 first_port; // outer source ports: first_port, and so many more
	__u16 ports;
	__u8 hops; // TTL of outer packets; 0: the inner one
	__u8 lengths;
	__u8 mac[ETH_ALEN];
	__u8 pods;   // the short way from pod to pod is on
	__u8 layer3; // a device without link headers: TUN or ipip
	__u8 process; // the userspace datapath is behind it
	__u8 ipip;    // RFC 2003 instead of VXLAN: ipip.h
	__u8 pad[2];
	struct address local;                // outer source
	struct address subnet;               // this node's
	struct address mask;                 // of it
	__u32 bits[MOST_LENGTHS];            // the lengths of peers' prefixes
	struct address masks[MOST_LENGTHS];
};

// A peer is found by what the device's packets name: the Ethernet destination, or, on
// a device of layer 3, the inner destination's prefix.
struct peer_key {
	__u16 family; // 4 or 6
	__u16 bits;   // of the prefix; 0 with an Ethernet address
	struct address to;
};

struct peer {
	struct address outer;
	__u8 mac[ETH_ALEN]; // inner Ethernet destination, for a device of layer 3
	__u8 pad[2];
	__u32 mtu; // of the path, outer packets; 0: there is no plain route
};

// What has been exchanged with a peer, in one direction.
struct traffic {
	__u64 packets; // segments, as on the wire
	__u64 bytes;   // of inner packets
};

struct source_key {
	__u32 bits;
	struct address outer;
	struct address inner; // masked
};

// The ways on from the uplink. They end in different queues, so a flow changes its
// way only where it cannot overtake itself.
enum way {
	DIRECT,
	JOINED, // through the pair of veth
	SLOW,   // by the device
};

// What came of a flow lately, and which way it takes.
struct flow {
	__u64 last;  // time, ns
	__u64 since; // the window's begin
	__u32 bytes; // that came in the window in single segments
	__u32 way;
	__u32 joining; // bytes of TCP payload that the pair of veth has taken and not given back
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH); // whose update is atomic, unlike an array's
	__uint(max_entries, 2);
	__type(key, __u32); // family
	__type(value, struct tunnel);
} tunnels SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct peer_key);
	__type(value, struct peer);
} peers SEC(".maps");

// What was sent to each peer, by the programs or by the vxlan device behind them.
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct peer_key);
	__type(value, struct traffic);
} sent SEC(".maps");

// The pairs of outer and inner source, and what the programs have taken from each.
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct source_key);
	__type(value, struct traffic);
} sources SEC(".maps");

#define FLOWS 8192

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FLOWS);
	__type(key, __u32);
	__type(value, struct flow);
} flows SEC(".maps");

// When something of an outer source was last left to the device without a look at its
// flows, ns: datagrams that travel as one frame (UDP_SEGMENT) may be of many, and a
// fragment of any. Sources may share an entry.
#define UNREAD_BITS 10
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1 << UNREAD_BITS);
	__type(key, __u32);
	__type(value, __u64);
} unread SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} identifications SEC(".maps");

// The verifier takes no pointer into the context, which the compiler would make of
// two readings of a field. So each is read once, by the program itself.
inline_always __u32 gso_size(struct __sk_buff *skb)
{
	__u32 n = skb->gso_size;

	asm volatile("" : "+r"(n));
	return n;
}

// clock is the time in ns, up to a tick (10 ms) late: the exact clock costs as much as a
// lookup (25 ns in a virtual machine), and nothing here is about less than 10 ms.
inline_always __u64 clock(void)
{
	return bpf_ktime_get_coarse_ns();
}

inline_always void count(__u32 which, __u64 n)
{
	__u64 *c = bpf_map_lookup_elem(&counters, &which);

	if (c)
		*c += n;
}

// What follows takes the packet if nobody else does.
inline_always int slow(__u32 reason)
{
	count(reason, 1);
	return TC_ACT_UNSPEC;
}

struct udp {
	__be16 source, destination, length, check;
};

#define CHANGES4 12 // the bytes of an IPv4 header up to its checksum

struct vxlan {
	__be32 flags, vni;
};

struct ethernet {
	__u8 destination[ETH_ALEN], source[ETH_ALEN];
	__be16 type;
};

struct tcp {
	__be16 source_port, destination_port;
	__be32 sequence, acknowledgement;
	__u8 offset, flags;
	__be16 window;
};

union transport {
	struct tcp tcp;
	struct udp udp;
	__be32 ports;
};

// The headers of an inner packet.
struct inner4 {
	struct iphdr ip;
	union transport on;
};

struct inner6 {
	struct ipv6hdr ip;
	union transport on;
};

union inner {
	struct inner4 four;
	struct inner6 six;
};

#define VXLAN_I bpf_htonl(0x08000000)

// The headers from the outer IP header to the inner Ethernet header: COST4 and COST6
// bytes. Behind them, for one call to write both, what changes of the inner header with its
// TTL; in outer6 the compiler puts two bytes.
struct outer4 {
	struct iphdr ip;
	struct udp udp;
	struct vxlan vxlan;
	struct ethernet ethernet;
	__be16 inner[CHANGES4 / 2];
};

struct outer6 {
	struct ipv6hdr ip;
	struct udp udp;
	struct vxlan vxlan;
	struct ethernet ethernet;
};

#define COST4 50
#define COST6 70
_Static_assert(__builtin_offsetof(struct outer4, inner) == COST4 && sizeof(struct outer6) == COST6 + 2, "headers have no gaps");

// read4 reads the headers of an IPv4 packet, mostly with one call. What follows the IP
// header is zero where the packet is shorter. False if there is no IPv4 header.
inline_always int read4(struct __sk_buff *skb, int at, struct inner4 *h)
{
	if (!bpf_skb_load_bytes(skb, at, h, sizeof(*h)) && h->ip.version == 4 && h->ip.ihl == 5)
		return 1;
	if (bpf_skb_load_bytes(skb, at, &h->ip, sizeof(h->ip)) || h->ip.version != 4 || h->ip.ihl < 5)
		return 0;
	if (bpf_skb_load_bytes(skb, at + h->ip.ihl * 4, &h->on, sizeof(h->on)))
		bpf_skb_load_bytes(skb, at + h->ip.ihl * 4, &h->on, sizeof(h->on.udp));
	return 1;
}

inline_always int read6(struct __sk_buff *skb, int at, struct inner6 *h)
{
	if (!bpf_skb_load_bytes(skb, at, h, sizeof(*h)))
		return h->ip.version == 6;
	if (bpf_skb_load_bytes(skb, at, &h->ip, sizeof(h->ip)) || h->ip.version != 6)
		return 0;
	bpf_skb_load_bytes(skb, at + sizeof(h->ip), &h->on, sizeof(h->on.udp));
	return 1;
}

inline_always int has_ports(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP;
}

// ports4 is both ports of a TCP or UDP packet: 0 of another protocol, and of fragments.
inline_always __be32 ports4(const struct inner4 *h)
{
	return has_ports(h->ip.protocol) && !(h->ip.frag_off & bpf_htons(0x3fff)) ? h->on.ports : 0;
}

inline_always __be32 ports6(const struct inner6 *h)
{
	return has_ports(h->ip.nexthdr) ? h->on.ports : 0;
}

inline_always __u32 flow_hash(const struct address *source, const struct address *destination, __u32 ports)
{
	__u32 h = ports;

#pragma unroll
	for (int w = 0; w < 4; w++)
		h = (h ^ source->word[w]) * 0x9e3779b1u + destination->word[w];
	h ^= h >> 15;
	return h * 0x85ebca6bu;
}

// flow_index is where the flow with the hash is in a map of FLOWS entries.
inline_always __u32 flow_index(__u32 hash)
{
	return hash >> 19; // 13 bits
}

#include "pods.h"

inline_always int same_mac(const __u8 *a, const __u8 *b)
{
	__u8 differ = 0;

#pragma unroll
	for (int i = 0; i < ETH_ALEN; i++)
		differ |= a[i] ^ b[i];
	return !differ;
}

// sum adds the 16-bit words of n bytes, an even number, in the order they have in
// memory, two at a time (RFC 1071, 2 (B) and (C)). at is aligned to 4 bytes.
inline_always __u64 sum(const void *at, int n)
{
	const __u8 *b = at;
	__u64 s = 0;
	int i;

#pragma unroll
	for (i = 0; i + 3 < n; i += 4)
		s += *(const __u32 *)(b + i);
	if (i < n)
		s += *(const __u16 *)(b + i);
	return s;
}

inline_always __u16 fold(__u64 s)
{
	s = (s & 0xffffffff) + (s >> 32);
	s = (s & 0xffff) + (s >> 16);
	s = (s & 0xffff) + (s >> 16);
	s = (s & 0xffff) + (s >> 16);
	return s;
}

// minus is what adds up to zero with s, in ones' complement.
inline_always __u64 minus(__u64 s)
{
	return (__u16)~fold(s);
}

inline_always __u64 protocol_word(__u8 protocol)
{
	return word16(protocol);
}

// payload4 is the sum of an inner IPv4 packet, told from its headers alone: that of
// its header is zero, since its own checksum makes it so, and that of what follows
// is the negative of the pseudo header for the same reason, whether the checksum is
// there already or left to the hardware (RFC 1624; Documentation/networking/checksum-offloads.rst,
// LCO). False where the packet has no checksum that covers it.
inline_always int payload4(const struct inner4 *h, __u64 *s)
{
	const struct iphdr *ip = &h->ip;
	__u32 length = bpf_ntohs(ip->tot_len) - ip->ihl * 4;

	if (ip->frag_off & bpf_htons(0x3fff)) // more fragments, or an offset
		return 0;
	switch (ip->protocol) {
	case IPPROTO_ICMP:
		*s = 0;
		return 1;
	case IPPROTO_UDP:
		if (!h->on.udp.check)
			return 0;
		break;
	case IPPROTO_TCP:
		break;
	default:
		return 0;
	}
	*s = minus(sum(&ip->saddr, 8) + protocol_word(ip->protocol) + word16(length));
	return 1;
}

inline_always int payload6(const struct inner6 *h, __u64 *s)
{
	const struct ipv6hdr *ip = &h->ip;

	switch (ip->nexthdr) {
	case IPPROTO_UDP:
		if (!h->on.udp.check)
			return 0;
		break;
	case IPPROTO_TCP:
	case IPPROTO_ICMPV6:
		break;
	default:
		return 0;
	}
	// The addresses are in both the header and the pseudo header.
	*s = sum(ip, 8) + minus(protocol_word(ip->nexthdr) + ip->payload_len);
	return 1;
}

// ecn is the outer traffic class: the inner one's ECN field, but for congestion,
// which the outer header begins anew (INET_ECN_encapsulate).
inline_always __u8 ecn(__u8 class)
{
	return (class & 3) == 3 ? 2 : class & 3;
}

// segment_length is how long the packets of a GSO frame become, inner headers
// included; 0 if that is not to be told.
inline_always __u32 segment_length(__u32 gso, __u8 protocol, const union transport *on, __u32 headers)
{
	switch (protocol) {
	case IPPROTO_UDP:
		return headers + 8 + gso;
	case IPPROTO_TCP:
		if (on->tcp.offset < 5 << 4)
			return 0;
		return headers + (on->tcp.offset >> 4) * 4 + gso;
	}
	return 0;
}

inline_always __u16 source_port(struct __sk_buff *skb, const struct tunnel *t, __u32 hash)
{
	// As udp_flow_src_port does it, so that a flow keeps its port on either path.
	hash ^= hash << 16;
	return t->first_port + (((__u64)hash * t->ports) >> 32);
}

inline_always __u32 segments(struct __sk_buff *skb)
{
	__u32 n = skb->gso_segs;

	asm volatile("" : "+r"(n));
	return n ? n : 1;
}

inline_always __be16 identification(__u32 n)
{
	__u32 zero = 0, *next = bpf_map_lookup_elem(&identifications, &zero);

	if (!next)
		return 0;
	*next += n;
	return bpf_htons(*next - n + bpf_get_smp_processor_id() * 0x3779);
}

inline_always int leaves(struct __sk_buff *skb, const struct tunnel *t, int at, __u32 packets, __u32 bytes)
{
	// bpf_redirect_neigh replaces a link header, so there has to be one.
	if (!at && bpf_skb_change_head(skb, ETH_HLEN, 0))
		return TC_ACT_SHOT; // out of memory
	count(OUT_PACKETS, packets);
	count(OUT_BYTES, bytes);
	count(OUT_FRAMES, 1);
	return bpf_redirect_neigh(t->uplink, 0, 0, 0);
}

#define WINDOW 10000000ull   // ns
#define PAUSE 110000000ll    // ns: less a tick of the clock, 100 ms
#define BULK (64 << 10)      // bytes

// flow_of finds what is known of an inner flow. Fragments are a flow of their own.
inline_always struct flow *flow_of(const struct address *source, const struct address *destination, __u32 ports)
{
	__u32 at = flow_index(flow_hash(source, destination, ports));

	return bpf_map_lookup_elem(&flows, &at);
}

// left leaves a packet to the device, and with it what its flow sends after it.
inline_always int left(struct flow *f, __u32 reason)
{
	if (f) {
		f->way = SLOW;
		f->joining = 0;
		f->last = clock();
	}
	return slow(reason);
}

inline_always __u64 *unread_of(const struct address *outer)
{
	__u32 at = ((outer->word[0] ^ outer->word[1] ^ outer->word[2] ^ outer->word[3]) * 0x9e3779b1u) >> (32 - UNREAD_BITS);

	return bpf_map_lookup_elem(&unread, &at);
}

// not_read notes that something of an outer source is left without a look at its flows.
inline_always void not_read(const struct address *outer)
{
	__u64 *last = unread_of(outer);

	if (last)
		*last = clock();
}

// follows_unread says whether a packet could overtake one of its flow in what its
// outer source sent just before.
inline_always int follows_unread(const struct address *outer)
{
	__u64 *last = unread_of(outer);

	if (!last || !*last)
		return 0;
	if ((__s64)(clock() - *last) <= PAUSE)
		return 1;
	*last = 0;
	return 0;
}

// kept says that a packet on its way out is the userspace datapath's because its flow
// is: the loop sends later than a program, so nothing may overtake what it has. A vxlan
// device sends at once, like a program, so for it there is no such state (f is 0).
inline_always int kept(struct flow *f)
{
	__u64 now;

	if (!f || f->way != SLOW)
		return 0;
	now = clock();
	if ((__s64)(now - f->last) > PAUSE) {
		f->way = DIRECT;
		return 0;
	}
	f->last = now;
	return 1;
}

// out4 encapsulates. With rewrite it also writes the inner IPv4 header as `in` has it.
inline_always int out4(struct __sk_buff *skb, __u32 gso, const struct tunnel *t, struct peer *p, int at, const struct inner4 *in, struct outer4 *h, int rewrite)
{
	const struct iphdr ip = in->ip;
	struct flow *f = 0;
	__u32 length = skb->len - at, hash, n = 1;
	__u64 s = 0; // the verifier forgets that it is set where it is used

	if (!at) {
		struct address source = { .word = { ip.saddr } }, destination = { .word = { ip.daddr } };

		f = flow_of(&source, &destination, ports4(in));
		if (kept(f))
			return slow(SLOW_OUT_FLOW);
	}
	h->udp.check = 0;
	if (gso) {
		__u32 each = 0;

		if (!(ip.frag_off & bpf_htons(0x3fff)))
			each = segment_length(gso, ip.protocol, &in->on, ip.ihl * 4);
		if (!each || length + COST4 > 0xffff)
			return left(f, SLOW_OUT_SEGMENTS);
		if (each + COST4 > p->mtu)
			return left(f, SLOW_OUT_LENGTH);
		n = segments(skb);
	} else if (length + COST4 > p->mtu || bpf_ntohs(ip.tot_len) != length) {
		return left(f, SLOW_OUT_LENGTH);
	} else if (!payload4(in, &s)) {
		return left(f, SLOW_OUT_CHECKSUM);
	}
	hash = bpf_get_hash_recalc(skb);
	if (!hash)
		return left(f, SLOW_OUT_HASH);
	if (bpf_skb_adjust_room(skb, COST4, BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
				BPF_F_ADJ_ROOM_ENCAP_L2(ETH_HLEN) | BPF_F_ADJ_ROOM_ENCAP_L2_ETH))
		return left(f, SLOW_OUT_ROOM);

	h->ip = (struct iphdr){
		.version = 4, .ihl = 5, .tos = ecn(ip.tos), .tot_len = bpf_htons(length + COST4), .id = identification(n),
		.ttl = t->hops, .protocol = IPPROTO_UDP, .saddr = t->local.word[0], .daddr = p->outer.word[0],
	};
	h->ip.check = ~fold(sum(&h->ip, sizeof(h->ip)));
	h->udp.source = bpf_htons(source_port(skb, t, hash));
	h->udp.destination = t->port;
	h->udp.length = bpf_htons(length + COST4 - sizeof(h->ip));
	h->vxlan.flags = VXLAN_I;
	h->vxlan.vni = t->vni;
	if (!gso) {
		s += sum(&h->udp, COST4 - sizeof(h->ip)) + sum(&h->ip.saddr, 8) + protocol_word(IPPROTO_UDP) + h->udp.length;
		h->udp.check = minus(s);
		if (!h->udp.check)
			h->udp.check = 0xffff;
	}
	if (rewrite)
		__builtin_memcpy(h->inner, &ip, CHANGES4);
	if (bpf_skb_store_bytes(skb, at, h, rewrite ? COST4 + CHANGES4 : COST4, 0))
		return TC_ACT_SHOT; // cannot be: the room is there
	return leaves(skb, t, at, n, length);
}

inline_always int out6(struct __sk_buff *skb, __u32 gso, const struct tunnel *t, struct peer *p, int at, const struct inner6 *in, struct outer6 *h)
{
	const struct ipv6hdr ip = in->ip;
	struct flow *f = 0;
	__u32 length = skb->len - at, hash;
	__u8 class;
	__u64 s;

	if (!at) {
		struct address source, destination;

		__builtin_memcpy(&source, &ip.saddr, 16);
		__builtin_memcpy(&destination, &ip.daddr, 16);
		f = flow_of(&source, &destination, ports6(in));
		if (kept(f))
			return slow(SLOW_OUT_FLOW);
	}
	if (gso) // over IPv6 there has to be a checksum
		return left(f, SLOW_OUT_SEGMENTS);
	if (length + COST6 > p->mtu || bpf_ntohs(ip.payload_len) + sizeof(ip) != length)
		return left(f, SLOW_OUT_LENGTH);
	if (!payload6(in, &s))
		return left(f, SLOW_OUT_CHECKSUM);
	hash = bpf_get_hash_recalc(skb);
	if (!hash)
		return left(f, SLOW_OUT_HASH);
	if (bpf_skb_adjust_room(skb, COST6, BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
				BPF_F_ADJ_ROOM_ENCAP_L2(ETH_HLEN) | BPF_F_ADJ_ROOM_ENCAP_L2_ETH))
		return left(f, SLOW_OUT_ROOM);

	class = ecn(ip.priority << 4 | ip.flow_lbl[0] >> 4);
	__builtin_memset(&h->ip, 0, sizeof(h->ip));
	h->ip.version = 6;
	h->ip.flow_lbl[0] = class << 4;
	h->ip.payload_len = bpf_htons(length + COST6 - sizeof(h->ip));
	h->ip.nexthdr = IPPROTO_UDP;
	h->ip.hop_limit = t->hops;
	__builtin_memcpy(&h->ip.saddr, &t->local, 16);
	__builtin_memcpy(&h->ip.daddr, &p->outer, 16);
	h->udp.source = bpf_htons(source_port(skb, t, hash));
	h->udp.destination = t->port;
	h->udp.length = h->ip.payload_len;
	h->udp.check = 0;
	h->vxlan.flags = VXLAN_I;
	h->vxlan.vni = t->vni;
	s += sum(&h->udp, COST6 - sizeof(h->ip)) + sum(&h->ip.saddr, 32) + protocol_word(IPPROTO_UDP) + h->udp.length;
	h->udp.check = minus(s);
	if (!h->udp.check)
		h->udp.check = 0xffff;
	if (bpf_skb_store_bytes(skb, at, h, COST6, 0))
		return TC_ACT_SHOT;
	return leaves(skb, t, at, 1, length);
}

inline_always int out_ipip(struct __sk_buff *skb, __u32 gso, const struct tunnel *t, const struct peer *p, int at, const struct inner4 *in);

// routed finds the peer that leases the inner destination, and its key.
inline_always struct peer *routed(const struct tunnel *t, const struct address *to, struct peer_key *key)
{
	struct peer *p;

#pragma clang loop unroll(disable)
	for (int i = 0; i < MOST_LENGTHS; i++) {
		if (i >= t->lengths)
			return 0;
		key->bits = t->bits[i];
#pragma unroll
		for (int w = 0; w < 4; w++)
			key->to.word[w] = to->word[w] & t->masks[i].word[w];
		p = bpf_map_lookup_elem(&peers, key);
		if (p)
			return p;
	}
	return 0;
}

// to_peer counts what the device or its programs send to a peer.
inline_always void to_peer(const struct peer_key *key, __u32 packets, __u32 bytes)
{
	struct traffic *c = bpf_map_lookup_elem(&sent, key);

	if (c) {
		c->packets += packets;
		c->bytes += bytes;
	}
}

// out3 is culvert_out where a peer is found by the inner destination. What it leaves to the
// userspace datapath, that counts.
inline_always int out3(struct __sk_buff *skb, __u32 gso, const struct tunnel *t, __u32 family)
{
	union {
		struct outer4 four;
		struct outer6 six;
	} h;
	struct peer_key key = { .family = family };
	struct ethernet ethernet;
	union inner in;
	struct address to = {};
	struct peer *p;
	__u32 at = t->layer3 ? 0 : ETH_HLEN, packets = segments(skb), bytes = skb->len - at;
	int verdict;

	if (family == 4) {
		if (!read4(skb, at, &in.four))
			return slow(SLOW_OUT_PROTOCOL);
		to.word[0] = in.four.ip.daddr;
	} else {
		if (!read6(skb, at, &in.six))
			return slow(SLOW_OUT_PROTOCOL);
		__builtin_memcpy(&to, &in.six.ip.daddr, 16);
	}
	p = routed(t, &to, &key);
	if (p && !t->process)
		to_peer(&key, packets, bytes);
	if (!p || !p->mtu)
		return slow(SLOW_OUT_PEER);
	if (t->ipip) {
		verdict = out_ipip(skb, gso, t, p, at, &in.four);
	} else {
		__builtin_memcpy(ethernet.destination, p->mac, ETH_ALEN);
		__builtin_memcpy(ethernet.source, t->mac, ETH_ALEN);
		ethernet.type = skb->protocol;
		if (family == 4) {
			h.four.ethernet = ethernet;
			verdict = out4(skb, gso, t, p, 0, &in.four, &h.four, 0);
		} else {
			h.six.ethernet = ethernet;
			verdict = out6(skb, gso, t, p, 0, &in.six, &h.six);
		}
	}
	if (verdict == TC_ACT_REDIRECT && t->process)
		to_peer(&key, packets, bytes);
	return verdict;
}

SEC("tc")
int culvert_out(struct __sk_buff *skb)
{
	union {
		struct outer4 four;
		struct outer6 six;
	} h;
	struct peer_key key = {};
	struct ethernet ethernet;
	union inner in;
	struct tunnel *t;
	struct peer *p;
	__u32 family, gso = gso_size(skb);

	if (skb->protocol == bpf_htons(ETH_P_IP))
		family = 4;
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		family = 6;
	else
		return slow(SLOW_OUT_PROTOCOL);
	t = bpf_map_lookup_elem(&tunnels, &family);
	if (!t || t->device != skb->ifindex || skb->vlan_present)
		return slow(SLOW_OUT_PROTOCOL);
	if (t->layer3 || t->ipip)
		return out3(skb, gso, t, family);
	if (bpf_skb_load_bytes(skb, 0, &ethernet, sizeof(ethernet)))
		return slow(SLOW_OUT_PROTOCOL);
	__builtin_memcpy(&key.to, ethernet.destination, ETH_ALEN);
	key.family = family;
	to_peer(&key, segments(skb), skb->len - ETH_HLEN);
	if (family == 4 ? !read4(skb, ETH_HLEN, &in.four) : !read6(skb, ETH_HLEN, &in.six))
		return slow(SLOW_OUT_PROTOCOL);
	if (t->pods) {
		struct segment s = {};
		struct shortcut *c;

		if (family == 4 ? segment4(&in.four, skb->len - ETH_HLEN, &s) : segment6(skb, ETH_HLEN, &in.six, skb->len - ETH_HLEN, &s)) {
			c = bpf_map_lookup_elem(&shortcuts, &s.key);
			if (c)
				passed(skb, c, &s);
		}
	}
	p = bpf_map_lookup_elem(&peers, &key);
	if (!p)
		return slow(SLOW_OUT_PEER);
	if (family == 4) {
		h.four.ethernet = ethernet;
		return out4(skb, gso, t, p, ETH_HLEN, &in.four, &h.four, 0);
	}
	h.six.ethernet = ethernet;
	return out6(skb, gso, t, p, ETH_HLEN, &in.six, &h.six);
}

// known says whether the outer and the inner source are a pair: what was taken from it
// is counted there.
inline_always struct traffic *known(const struct tunnel *t, const struct address *outer, const struct address *inner)
{
	struct source_key key;
	struct traffic *from;

	key.outer = *outer;
#pragma clang loop unroll(disable)
	for (int i = 0; i < MOST_LENGTHS; i++) {
		if (i >= t->lengths)
			return NULL;
		key.bits = t->bits[i];
#pragma unroll
		for (int w = 0; w < 4; w++)
			key.inner.word[w] = inner->word[w] & t->masks[i].word[w];
		from = bpf_map_lookup_elem(&sources, &key);
		if (from)
			return from;
	}
	return NULL;
}

inline_always int ours(const struct tunnel *t, const struct address *to)
{
	__u32 differ = 0;

#pragma unroll
	for (int w = 0; w < 4; w++)
		differ |= (to->word[w] & t->mask.word[w]) ^ t->subnet.word[w];
	return !differ;
}

inline_always int equal(const struct address *a, const struct address *b)
{
	return !((a->word[0] ^ b->word[0]) | (a->word[1] ^ b->word[1]) | (a->word[2] ^ b->word[2]) | (a->word[3] ^ b->word[3]));
}

// wanted looks at what stands between the outer and the inner IP header.
inline_always int wanted(const struct tunnel *t, const struct vxlan *v, const struct ethernet *e, __be16 type)
{
	return v->flags == VXLAN_I && v->vni == t->vni && e->type == type && same_mac(e->destination, t->mac) &&
	       !same_mac(e->source, t->mac);
}

// way_of chooses the way of a packet. TCP that arrives in bulk and in single segments
// goes through the pair of veth, where GRO joins them: at once, since it cannot
// overtake what went before, as both ways end in the same queue. From there it comes
// back when segments come joined again and the pair has nothing of it left, or after a
// pause; from the device's way only after a pause.
//
// Frames that come joined are the device's: no program can take the tunnel's marks off
// them (SKB_GSO_UDP_TUNNEL, skb->encapsulation), and with those on the next bridge would
// cut them in software, which costs more than all that is saved.
inline_always __u32 way_of(__u32 gso, const struct tunnel *t, struct flow *f, int tcp, __u32 bytes, int shortcut_valid)
{
	__u64 now;

	if (!f || (f->way == DIRECT && (!tcp || !t->joiner)))
		return DIRECT;
	now = clock();
	if ((f->way != DIRECT && (__s64)(now - f->last) > PAUSE) || // clocks of processors differ
	    (f->way == JOINED && gso && !f->joining) ||
	    (f->way == SLOW && shortcut_valid)) { // nothing of it is left on the device's way
		f->way = DIRECT;
		f->bytes = 0;
		f->joining = 0;
	}
	f->last = now;
	if (f->way == SLOW || !tcp || !t->joiner)
		return f->way;
	if (now - f->since > WINDOW || gso) {
		f->since = now;
		f->bytes = 0;
	}
	if (!gso)
		f->bytes += bytes;
	if (f->bytes > BULK)
		f->way = JOINED;
	return f->way;
}

// left_at_once says that a large frame is the device's whatever it holds, before it
// has cost more than that: nearly all bulk is such where frames come joined. What is
// left takes no look at its source here, and has a full one below.
inline_always int left_at_once(__u32 gso, const struct flow *f)
{
	return gso && (!f || f->way != JOINED);
}

// joins says that a packet goes through the pair of veth because its flow does: there
// is nothing else to find out, and most of bulk is such.
inline_always int joins(__u32 gso, struct flow *f)
{
	__u64 now;

	if (gso || !f || f->way != JOINED)
		return 0;
	now = clock();
	if ((__s64)(now - f->last) > PAUSE)
		return 0;
	f->last = now;
	return 1;
}

// payload_of is the length of what a TCP segment bears, of length bytes with its header.
inline_always __u32 payload_of(const union transport *on, __u32 length)
{
	return length - (on->tcp.offset >> 4) * 4;
}

// joining keeps account of what the pair of veth holds of a flow: payload goes in,
// or, negative, comes out.
inline_always void joining(struct flow *f, __u32 payload)
{
	if (f)
		__sync_fetch_and_add(&f->joining, payload);
}

// The shortcut of an incoming packet.
struct passage {
	struct shortcut *c; // NULL: none
	struct segment s;   // set if c is
	int valid;          // and may take it now
};

inline_always void passage_of(struct passage *w)
{
	w->c = bpf_map_lookup_elem(&shortcuts, &w->s.key);
	w->valid = w->c && is_valid(w->c, &w->s);
}

// to_pod hands a packet to the pod, past the host. ip is its IPv4 header, or NULL.
inline_always int to_pod(struct __sk_buff *skb, const struct tunnel *t, struct shortcut *c, const struct segment *s, const struct iphdr *ip)
{
	struct {
		struct ethernet ethernet;
		__be16 inner[CHANGES4 / 2];
	} h;

	asm volatile("" : "+r"(c)); // the verifier does not follow that it is set
	if (!c)
		return TC_ACT_SHOT;
	h.ethernet = c->ethernet;
	if (ip) {
		struct iphdr inner = *ip;

		one_hop(&inner); // of which the sum stays
		__builtin_memcpy(h.inner, &inner, CHANGES4);
		if (bpf_skb_store_bytes(skb, 0, &h, ETH_HLEN + CHANGES4, 0))
			return TC_ACT_SHOT; // cannot be: the packet is longer
	} else {
		if (bpf_skb_store_bytes(skb, 0, &h, ETH_HLEN, 0))
			return TC_ACT_SHOT;
		set_hops(skb, s->hops - 1);
	}
	count(IN_SHORT, 1);
	return c->queued == c->unqueued ? into_pod(skb, c->link) : into_queue(skb, t, c);
}

// unqueued takes a packet out of the queue before the pods' links.
inline_always int unqueued(struct __sk_buff *skb, const struct ethernet *e)
{
	struct segment s = {};
	struct shortcut *c;
	union inner in;
	__u32 link = skb->mark;

	// What the pair's near end says of its own accord is for nobody.
	if (!link || (e->destination[0] & 1) || !segment_of(skb, &in, &s))
		return TC_ACT_SHOT;
	c = bpf_map_lookup_elem(&shortcuts, &s.key);
	if (c) // else the connection has ended meanwhile
		c->unqueued = skb->priority;
	bpf_skb_change_type(skb, PACKET_HOST);
	return into_pod(skb, link);
}

// enters hands on a packet whose outer headers are gone.
inline_always int enters(struct __sk_buff *skb, const struct tunnel *t, const struct ethernet *e, const struct iphdr *ip, struct passage *w,
			 __u32 way, struct traffic *from, __u32 packets, __u32 bytes)
{
	from->packets += packets;
	from->bytes += bytes;
	count(IN_PACKETS, packets);
	count(IN_BYTES, bytes);
	count(IN_FRAMES, 1);
	if (w->valid && way == DIRECT)
		return to_pod(skb, t, w->c, &w->s, ip);
	if (bpf_skb_store_bytes(skb, 0, e, sizeof(*e), 0))
		return TC_ACT_SHOT; // cannot be: the packet is longer
	if (way == JOINED) {
		count(IN_JOINED, 1);
		return bpf_redirect(t->joiner, 0);
	}
	return bpf_redirect(t->device, BPF_F_INGRESS);
}

// uncover takes the outer headers off: 0, or the reason for which it cannot. `sum_known` says that
// the outer checksum, if right, means that the inner one is; `unfinished` that the outer one
// was left to the hardware by a sender that there is no wire to, as on veth and between
// virtual machines.
inline_always __u32 uncover(struct __sk_buff *skb, __u32 gso, int cost, int check, int sum_known, int unfinished)
{
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO;
	__s64 level = bpf_csum_level(skb, BPF_CSUM_LEVEL_QUERY);

	// A GSO frame comes from this machine, or was joined here, for which its
	// checksums have been verified. Only one whose flow is in the pair comes here.
	if (gso)
		flags |= BPF_F_ADJ_ROOM_NO_CSUM_RESET;
	else if (check && !sum_known && !unfinished && level < 0)
		return SLOW_IN_CHECKSUM;
	else if (level > 0 || (!level && check && sum_known))
		flags |= BPF_F_ADJ_ROOM_NO_CSUM_RESET;
	if (bpf_skb_adjust_room(skb, -cost, BPF_ADJ_ROOM_MAC, flags))
		return SLOW_IN_ROOM;
	if (level > 0 && !gso)
		bpf_csum_level(skb, BPF_CSUM_LEVEL_DEC);
	return 0;
}

// decapsulated is the inner ECN field that RFC 6040, figure 4, asks for, or -1 if the
// packet must be dropped.
inline_always int decapsulated(__u8 outer, __u8 inner)
{
	outer &= 3;
	inner &= 3;
	if (outer == 3)
		return inner ? 3 : -1;
	if (outer == 1 && inner == 2)
		return 1;
	return inner;
}

// set_ecn4 changes the ECN field of the IPv4 packet behind the Ethernet header.
inline_always void set_ecn4(struct __sk_buff *skb, __u8 tos, __u8 ecn)
{
	__u8 byte = (tos & ~3) | ecn;
	__be16 before = bpf_htons(tos), after = bpf_htons(byte);

	// The header's own checksum goes along, so that the sum of it all stays.
	bpf_l3_csum_replace(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, check), before, after, 2);
	bpf_skb_store_bytes(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, tos), &byte, 1, 0);
}

inline_always int in4(struct __sk_buff *skb, __u32 gso)
{
	struct address source = {}, outer = {}, destination = {};
	struct passage passage = {}, *w = &passage;
	__u32 family = 4, length, way, reason;
	int sum_known, unfinished, class, joined, verdict;
	struct traffic *from;
	struct outer4 h;
	struct inner4 in;
	struct tunnel *t;
	struct flow *f;
	__u64 s, inner = 0;

	t = bpf_map_lookup_elem(&tunnels, &family);
	if (!t || t->ipip || t->uplink != skb->ifindex || bpf_skb_load_bytes(skb, ETH_HLEN, &h, COST4))
		return TC_ACT_UNSPEC;
	if (h.ip.daddr != t->local.word[0] || skb->vlan_present)
		return TC_ACT_UNSPEC;
	outer.word[0] = h.ip.saddr;
	if (h.ip.frag_off & bpf_htons(0x3fff)) { // it may be anybody's
		if (!(h.ip.frag_off & bpf_htons(0x1fff)) && h.udp.destination == t->port)
			not_read(&outer);
		return slow(SLOW_IN_FRAGMENT);
	}
	if (h.udp.destination != t->port)
		return TC_ACT_UNSPEC;
	if (h.ip.version != 4 || fold(sum(&h.ip, sizeof(h.ip))) != 0xffff)
		return slow(SLOW_IN_OPTIONS);
	length = skb->len - ETH_HLEN;
	if (bpf_ntohs(h.ip.tot_len) != length || bpf_ntohs(h.udp.length) + sizeof(h.ip) != length)
		return slow(SLOW_IN_LENGTH);
	if (!wanted(t, &h.vxlan, &h.ethernet, bpf_htons(ETH_P_IP)) || !read4(skb, ETH_HLEN + COST4, &in))
		return slow(SLOW_IN_HEADER);
	length -= COST4;
	if (gso && bpf_ntohs(in.ip.tot_len) != length)
		not_read(&outer);
	source.word[0] = in.ip.saddr;
	destination.word[0] = in.ip.daddr;
	f = flow_of(&source, &destination, ports4(&in));
	joined = joins(gso, f);
	if (!joined && t->pods && segment4(&in, length, &w->s))
		passage_of(w);
	if (!w->c && left_at_once(gso, f))
		return left(f, SLOW_IN_SEGMENTS);
	from = known(t, &outer, &source);
	if (!from)
		return slow(SLOW_IN_SOURCE);
	if (!ours(t, &destination))
		return slow(SLOW_IN_DESTINATION);
	if (w->c && !w->valid)
		give(w->c, &w->s);
	if (!w->valid && left_at_once(gso, f))
		return left(f, SLOW_IN_SEGMENTS);
	class = decapsulated(h.ip.tos, in.ip.tos);
	if (class < 0) {
		f = NULL;
		reason = SLOW_IN_ECN;
		goto leave;
	}
	reason = SLOW_IN_LENGTH;
	if (bpf_ntohs(in.ip.tot_len) != length || length < in.ip.ihl * 4)
		goto leave;
	reason = SLOW_IN_FLOW;
	if (follows_unread(&outer))
		goto leave;
	way = joined ? JOINED : way_of(gso, t, f, in.ip.protocol == IPPROTO_TCP, length, w->valid);
	if (way == SLOW)
		return slow(SLOW_IN_FLOW);
	if (gso && way == DIRECT && !w->valid)
		return left(f, SLOW_IN_SEGMENTS);
	s = sum(&h.ip.saddr, 8) + protocol_word(IPPROTO_UDP) + h.udp.length;
	unfinished = fold(s) == h.udp.check;
	sum_known = 0;
	if (!gso && h.udp.check && payload4(&in, &inner)) {
		sum_known = fold(s + inner + sum(&h.udp, COST4 - sizeof(h.ip))) == 0xffff;
	}
	reason = uncover(skb, gso, COST4, h.udp.check, sum_known, unfinished);
	if (reason)
		goto leave;
	if (way == JOINED)
		joining(f, payload_of(&in.on, length - in.ip.ihl * 4));
	verdict = enters(skb, t, &h.ethernet, &in.ip, w, way, from, segments(skb), length);
	if (class != (in.ip.tos & 3))
		set_ecn4(skb, in.ip.tos, class);
	return verdict;

leave: // to the device, which is noted of a packet that could have taken its shortcut
	if (joined && t->pods && segment4(&in, length, &w->s)) {
		w->c = bpf_map_lookup_elem(&shortcuts, &w->s.key);
		w->valid = !!w->c;
	}
	if (w->c && w->valid)
		give(w->c, &w->s);
	return left(f, reason);
}

inline_always int in6(struct __sk_buff *skb, __u32 gso)
{
	struct address source, outer, destination, local;
	struct passage passage = {}, *w = &passage;
	__u32 family = 6, length, way, reason;
	int sum_known, unfinished, class, joined, verdict;
	struct traffic *from;
	struct outer6 h;
	struct inner6 in;
	struct tunnel *t;
	struct flow *f;
	__u8 inner_class;
	__u64 s, inner = 0;

	t = bpf_map_lookup_elem(&tunnels, &family);
	if (!t || t->uplink != skb->ifindex || bpf_skb_load_bytes(skb, ETH_HLEN, &h, COST6))
		return TC_ACT_UNSPEC;
	__builtin_memcpy(&destination, &h.ip.daddr, 16);
	local = t->local;
	if (!equal(&destination, &local) || skb->vlan_present || h.udp.destination != t->port)
		return TC_ACT_UNSPEC;
	if (h.ip.version != 6)
		return slow(SLOW_IN_OPTIONS);
	length = skb->len - ETH_HLEN;
	if (bpf_ntohs(h.ip.payload_len) + sizeof(h.ip) != length || h.udp.length != h.ip.payload_len)
		return slow(SLOW_IN_LENGTH);
	if (!wanted(t, &h.vxlan, &h.ethernet, bpf_htons(ETH_P_IPV6)) || !read6(skb, ETH_HLEN + COST6, &in))
		return slow(SLOW_IN_HEADER);
	length -= COST6;
	__builtin_memcpy(&outer, &h.ip.saddr, 16);
	if (gso && bpf_ntohs(in.ip.payload_len) + sizeof(in.ip) != length)
		not_read(&outer);
	__builtin_memcpy(&source, &in.ip.saddr, 16);
	__builtin_memcpy(&destination, &in.ip.daddr, 16);
	f = flow_of(&source, &destination, ports6(&in));
	joined = joins(gso, f);
	if (!joined && t->pods && segment6(skb, ETH_HLEN + COST6, &in, length, &w->s))
		passage_of(w);
	if (!w->c && left_at_once(gso, f))
		return left(f, SLOW_IN_SEGMENTS);
	from = known(t, &outer, &source);
	if (!from)
		return slow(SLOW_IN_SOURCE);
	if (!ours(t, &destination))
		return slow(SLOW_IN_DESTINATION);
	if (w->c && !w->valid)
		give(w->c, &w->s);
	if (!w->valid && left_at_once(gso, f))
		return left(f, SLOW_IN_SEGMENTS);
	inner_class = in.ip.flow_lbl[0] >> 4;
	class = decapsulated(h.ip.flow_lbl[0] >> 4, inner_class);
	if (class < 0) {
		f = NULL;
		reason = SLOW_IN_ECN;
		goto leave;
	}
	reason = SLOW_IN_LENGTH;
	if (bpf_ntohs(in.ip.payload_len) + sizeof(in.ip) != length)
		goto leave;
	reason = SLOW_IN_FLOW;
	if (follows_unread(&outer))
		goto leave;
	way = joined ? JOINED : way_of(gso, t, f, in.ip.nexthdr == IPPROTO_TCP, length, w->valid);
	if (way == SLOW)
		return slow(SLOW_IN_FLOW);
	if (gso && way == DIRECT && !w->valid)
		return left(f, SLOW_IN_SEGMENTS);
	s = sum(&h.ip.saddr, 32) + protocol_word(IPPROTO_UDP) + h.udp.length;
	unfinished = fold(s) == h.udp.check;
	sum_known = 0;
	if (!gso && h.udp.check && payload6(&in, &inner)) {
		sum_known = fold(s + inner + sum(&h.udp, COST6 - sizeof(h.ip))) == 0xffff;
	}
	reason = uncover(skb, gso, COST6, h.udp.check, sum_known, unfinished);
	if (reason)
		goto leave;
	if (way == JOINED)
		joining(f, payload_of(&in.on, length - sizeof(in.ip)));
	verdict = enters(skb, t, &h.ethernet, NULL, w, way, from, segments(skb), length);
	if (class != (inner_class & 3)) {
		__u8 byte = (in.ip.flow_lbl[0] & 0xcf) | class << 4;

		bpf_skb_store_bytes(skb, ETH_HLEN + 1, &byte, 1, BPF_F_RECOMPUTE_CSUM);
	}
	return verdict;

leave: // as in4 does
	if (joined && t->pods && segment6(skb, ETH_HLEN + COST6, &in, length, &w->s)) {
		w->c = bpf_map_lookup_elem(&shortcuts, &w->s.key);
		w->valid = !!w->c;
	}
	if (w->c && w->valid)
		give(w->c, &w->s);
	return left(f, reason);
}

// fragment6 leaves an outer fragment, which may be anybody's.
inline_always int fragment6(struct __sk_buff *skb)
{
	struct {
		struct ipv6hdr ip;
		__u8 next, reserved;
		__be16 offset;
		__be32 identification;
		__be16 source, destination;
	} h;
	struct address outer, destination, local;
	__u32 family = 6;
	struct tunnel *t;

	t = bpf_map_lookup_elem(&tunnels, &family);
	if (!t || t->uplink != skb->ifindex || bpf_skb_load_bytes(skb, ETH_HLEN, &h, sizeof(h)))
		return TC_ACT_UNSPEC;
	__builtin_memcpy(&destination, &h.ip.daddr, 16);
	local = t->local;
	if (!equal(&destination, &local))
		return TC_ACT_UNSPEC;
	if (!(h.offset & bpf_htons(0xfff8)) && h.next == IPPROTO_UDP && h.destination == t->port) {
		__builtin_memcpy(&outer, &h.ip.saddr, 16);
		not_read(&outer);
	}
	return slow(SLOW_IN_FRAGMENT);
}

#include "ipip.h"

SEC("tc")
int culvert_in(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 gso = gso_size(skb);

	if (skb->pkt_type != PACKET_HOST)
		return TC_ACT_UNSPEC;
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = data + ETH_HLEN;

		if ((void *)(ip + 1) > end || ip->ihl != 5)
			return TC_ACT_UNSPEC;
		if (ip->protocol == IPPROTO_UDP)
			return in4(skb, gso);
		if (ip->protocol == IPPROTO_IPIP)
			return in_ipip(skb, gso);
		if (ip->protocol == IPPROTO_ICMP)
			told(skb);
		return TC_ACT_UNSPEC;
	}
	if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = data + ETH_HLEN;

		if ((void *)(ip + 1) > end)
			return TC_ACT_UNSPEC;
		if (ip->nexthdr == IPPROTO_FRAGMENT)
			return fragment6(skb);
		if (ip->nexthdr != IPPROTO_UDP)
			return TC_ACT_UNSPEC;
		return in6(skb, gso);
	}
	return TC_ACT_UNSPEC;
}

SEC("tc")
int culvert_join(struct __sk_buff *skb)
{
	struct ethernet ethernet;
	struct passage w = {};
	union inner in;
	struct tunnel *t;
	__u32 family, length = skb->len - ETH_HLEN;

	if (skb->protocol == bpf_htons(ETH_P_IP))
		family = 4;
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		family = 6;
	else
		return TC_ACT_SHOT;
	t = bpf_map_lookup_elem(&tunnels, &family);
	if (!t || bpf_skb_load_bytes(skb, 0, &ethernet, sizeof(ethernet)))
		return TC_ACT_SHOT;
	if (!same_mac(ethernet.destination, t->mac))
		return unqueued(skb, &ethernet);
	if (family == 4) {
		struct address source = {}, destination = {};

		if (!read4(skb, ETH_HLEN, &in.four))
			return TC_ACT_SHOT; // cannot be
		source.word[0] = in.four.ip.saddr;
		destination.word[0] = in.four.ip.daddr;
		joining(flow_of(&source, &destination, ports4(&in.four)), -payload_of(&in.four.on, length - in.four.ip.ihl * 4));
		if (t->pods && segment4(&in.four, length, &w.s))
			passage_of(&w);
	} else {
		struct address source, destination;

		if (!read6(skb, ETH_HLEN, &in.six))
			return TC_ACT_SHOT;
		__builtin_memcpy(&source, &in.six.ip.saddr, 16);
		__builtin_memcpy(&destination, &in.six.ip.daddr, 16);
		joining(flow_of(&source, &destination, ports6(&in.six)), -payload_of(&in.six.on, length - sizeof(in.six.ip)));
		if (t->pods && segment6(skb, ETH_HLEN, &in.six, length, &w.s))
			passage_of(&w);
	}
	if (w.valid)
		return to_pod(skb, t, w.c, &w.s, family == 4 ? &in.four.ip : NULL);
	if (w.c)
		give(w.c, &w.s);
	return bpf_redirect(t->device, BPF_F_INGRESS);
}

SEC("tc")
int culvert_pod_out(struct __sk_buff *skb)
{
	union {
		struct outer4 four;
		struct outer6 six;
	} h;
	struct segment s = {};
	struct peer_key key = {};
	struct ethernet ethernet;
	union inner in;
	struct shortcut *c;
	struct tunnel *t;
	struct peer *p;
	__u32 gso = gso_size(skb), bytes = skb->len - ETH_HLEN;
	int verdict;

	if (skb->vlan_present || !segment_of(skb, &in, &s))
		return TC_ACT_UNSPEC;
	t = bpf_map_lookup_elem(&tunnels, &s.family);
	if (!t || bpf_skb_load_bytes(skb, 0, &ethernet, sizeof(ethernet)))
		return TC_ACT_UNSPEC;
	c = bpf_map_lookup_elem(&shortcuts, &s.key);
	if (s.flags & (TCP_SYN | TCP_FIN | TCP_RST)) {
		if (c)
			ended(&s);
		return TC_ACT_UNSPEC;
	}
	if (!c || c->link != skb->ifindex) { // or it was another pod's
		propose(skb, &s, ethernet.source, ethernet.destination);
		return TC_ACT_UNSPEC;
	}
	// An IPv6 super-frame is for the vxlan device: see out6.
	if (!is_valid(c, &s) || !same_mac(ethernet.destination, c->bridge) || (gso && s.family == 6))
		goto host;
	__builtin_memcpy(&key.to, c->ethernet.destination, ETH_ALEN);
	key.family = s.family;
	p = bpf_map_lookup_elem(&peers, &key);
	if (!p)
		goto host;
	if (s.family == 4) {
		h.four.ethernet = c->ethernet;
		one_hop(&in.four.ip);
		verdict = out4(skb, gso, t, p, ETH_HLEN, &in.four, &h.four, 1);
	} else {
		set_hops(skb, s.hops - 1);
		in.six.ip.hop_limit = s.hops - 1; // which the outer checksum covers
		h.six.ethernet = c->ethernet;
		verdict = out6(skb, gso, t, p, ETH_HLEN, &in.six, &h.six);
	}
	if (verdict != TC_ACT_UNSPEC) {
		count(OUT_SHORT, 1);
		to_peer(&key, segments(skb), bytes);
		return verdict;
	}
	if (s.family == 6)
		set_hops(skb, s.hops);
host:
	give(c, &s);
	return TC_ACT_UNSPEC;
}

SEC("tc")
int culvert_pod_in(struct __sk_buff *skb)
{
	struct segment s = {};
	struct shortcut *c;
	struct tunnel *t;
	union inner in;

	if (skb->vlan_present || !segment_of(skb, &in, &s))
		return TC_ACT_UNSPEC;
	c = bpf_map_lookup_elem(&shortcuts, &s.key);
	if (!c || c->link != skb->ifindex) {
		struct ethernet ethernet;

		// A TCP connection is proposed for what the pod sends.
		if (s.key.protocol == IPPROTO_UDP && !bpf_skb_load_bytes(skb, 0, &ethernet, sizeof(ethernet)))
			propose(skb, &s, ethernet.destination, ethernet.source);
		return TC_ACT_UNSPEC;
	}
	if (s.flags & (TCP_SYN | TCP_FIN | TCP_RST)) {
		ended(&s);
		return TC_ACT_UNSPEC;
	}
	t = bpf_map_lookup_elem(&tunnels, &s.family);
	if (!t || !t->queue)
		return TC_ACT_UNSPEC;
	passed(skb, c, &s);
	return into_queue(skb, t, c);
}

char _license[] SEC("license") = "Apache-2.0";
