/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The short way from pod to pod (--fast-path=pod), for TCP connections without NAT:
 *
 *	culvert_pod_out  ingress of the host's end of a pod's veth: encapsulates there, and
 *	                 sends to the uplink, past the bridge, the routes and the netfilter hooks
 *	culvert_pod_in   egress of that end: sees what arrives by the host's way
 *
 * and culvert_in hands a packet to the pod's veth itself.
 *
 * A connection takes the host's way until user space has found it established in
 * conntrack and entered both its directions in `shortcuts`. From then on a direction is short
 * for LIFE after one of its packets has passed the host's way from end to end,
 * unchanged. Then its next packets take the host's way again, and renew it when they come
 * out. So whatever the host decides of a connection (a rule, a route, a pod that is gone)
 * holds at most LIFE later, by whatever program it was decided.
 *
 * A direction becomes short when the last packet that was given to the host's way is the
 * last one that came out of it, so no packet overtakes another. Packets are told
 * apart by the end of their sequence numbers and their acknowledgement: GRO and
 * segmentation leave those of the last one as they are.
 */

#define LIFE 250000000ull // ns

struct flow_key {
	struct address source, destination;
	__be16 source_port, destination_port;
};

// Where a packet is in its connection: the end of its sequence numbers, and what it acknowledges.
struct position {
	__u32 end, acknowledged;
};

inline_always int same_position(const struct position *a, const struct position *b)
{
	return a->end == b->end && a->acknowledged == b->acknowledged;
}

// beyond says that a is not before b in either respect (RFC 9293, section 3.4).
inline_always int beyond(const struct position *a, const struct position *b)
{
	return (__s32)(a->end - b->end) >= 0 && (__s32)(a->acknowledged - b->acknowledged) >= 0;
}

struct shortcut {
	__u64 until;        // the time when it ends, ns; 0: takes the host's way
	__u32 generation;   // of the host's state, when it was made or renewed
	__u32 link;         // the host's end of the pod's veth
	struct position given; // the farthest packet given to the host's way
	struct ethernet ethernet; // out: of the inner packet to the peer; in: of the packet to the pod
	__u8 bridge[ETH_ALEN];    // out: where the pod sends its packets
	__u8 gave;                // given is set
	__u8 pad[3];
};

// What culvert_pod_out tells user space of a connection that is not in shortcuts.
struct candidate {
	struct flow_key key;
	__u32 family, link;
	__u8 pod[ETH_ALEN], bridge[ETH_ALEN];
};

// Packets that a connection has sent. Connections may share a count.
struct tally {
	__u32 flow, packets;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct flow_key);
	__type(value, struct shortcut);
} shortcuts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FLOWS);
	__type(key, __u32);
	__type(value, struct tally);
} tallies SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 65536);
} candidates SEC(".maps");

// The generation of the host's state: shortcuts of another one take the host's way.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} generations SEC(".maps");

inline_always __u32 generation(void)
{
	__u32 zero = 0, *g = bpf_map_lookup_elem(&generations, &zero);

	return g ? *g : 0;
}

struct tcp {
	__be16 source_port, destination_port;
	__be32 sequence, acknowledgement;
	__u8 offset, flags;
	__be16 window;
};

#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16

// A TCP packet, from its headers.
struct segment {
	struct flow_key key;
	struct position position;
	__u32 family;
	__u8 flags, hops;
};

// segment_of reads the inner IP header, which is at `at`, and the TCP header. False for
// everything but a whole TCP packet without IP options and extension headers.
inline_always int segment_of(struct __sk_buff *skb, __be16 protocol, int at, struct segment *s)
{
	__u32 length, header;
	struct tcp tcp;

	if (protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr ip;

		if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl != 5 || ip.protocol != IPPROTO_TCP ||
		    (ip.frag_off & bpf_htons(0x3fff)))
			return 0;
		s->family = 4;
		s->hops = ip.ttl;
		s->key.source = (struct address){ { ip.saddr } };
		s->key.destination = (struct address){ { ip.daddr } };
		header = sizeof(ip);
	} else if (protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr ip;

		if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)) || ip.version != 6 || ip.nexthdr != IPPROTO_TCP)
			return 0;
		s->family = 6;
		s->hops = ip.hop_limit;
		__builtin_memcpy(&s->key.source, &ip.saddr, 16);
		__builtin_memcpy(&s->key.destination, &ip.daddr, 16);
		header = sizeof(ip);
	} else {
		return 0;
	}
	if (bpf_skb_load_bytes(skb, at + header, &tcp, sizeof(tcp)))
		return 0;
	s->key.source_port = tcp.source_port;
	s->key.destination_port = tcp.destination_port;
	s->flags = tcp.flags;
	length = skb->len - at - header - (tcp.offset >> 4) * 4; // of the payload
	s->position.end = bpf_ntohl(tcp.sequence) + length;
	s->position.acknowledged = bpf_ntohl(tcp.acknowledgement);
	return 1;
}

// is_valid says whether a packet of the connection may take the shortcut.
inline_always int is_valid(const struct shortcut *c, const struct segment *s)
{
	return c->until && (__s64)(c->until - bpf_ktime_get_ns()) > 0 && c->generation == generation() &&
	       (s->flags & (TCP_SYN | TCP_FIN | TCP_RST | TCP_ACK)) == TCP_ACK && s->hops > 1;
}

// give notes that a packet takes the host's way.
inline_always void give(struct shortcut *c, const struct segment *s)
{
	c->until = 0;
	if (c->gave && !beyond(&s->position, &c->given)) // sent again
		return;
	c->given = s->position;
	c->gave = 1;
}

// passed notes that a packet has come out of the host's way, and makes its direction
// short if nothing else is on that way.
inline_always void passed(struct shortcut *c, const struct segment *s)
{
	if (c->until || !c->gave || !same_position(&c->given, &s->position))
		return;
	c->generation = generation();
	c->until = bpf_ktime_get_ns() + LIFE;
}

// ended forgets a connection that is being closed: conntrack must see the rest of it.
inline_always void ended(const struct segment *s)
{
	struct flow_key back = {
		.source = s->key.destination, .destination = s->key.source,
		.source_port = s->key.destination_port, .destination_port = s->key.source_port,
	};

	bpf_map_delete_elem(&shortcuts, &s->key);
	bpf_map_delete_elem(&shortcuts, &back);
}

// propose tells user space of a connection at its 32nd packet, its 64th and so on.
inline_always void propose(struct __sk_buff *skb, const struct segment *s, const struct ethernet *e)
{
	__u32 h = flow_hash(&s->key.source, &s->key.destination, s->key.source_port | (__u32)s->key.destination_port << 16);
	__u32 at = flow_index(h);
	struct candidate *c;
	struct tally *t;

	t = bpf_map_lookup_elem(&tallies, &at);
	if (!t)
		return;
	if (t->flow != h) {
		t->flow = h;
		t->packets = 0;
	}
	if (++t->packets < 32 || (t->packets & (t->packets - 1)))
		return;
	c = bpf_ringbuf_reserve(&candidates, sizeof(*c), 0);
	if (!c)
		return;
	c->key = s->key;
	c->family = s->family;
	c->link = skb->ifindex;
	__builtin_memcpy(c->pod, e->source, ETH_ALEN);
	__builtin_memcpy(c->bridge, e->destination, ETH_ALEN);
	bpf_ringbuf_submit(c, 0);
}

// set_hops changes the TTL or hop limit of the IP packet behind the Ethernet header.
inline_always void set_hops(struct __sk_buff *skb, __u32 family, __u8 from, __u8 to)
{
	if (family == 4) { // the header's checksum goes along, so the sum of it all stays
		bpf_l3_csum_replace(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, check), bpf_htons(from << 8), bpf_htons(to << 8), 2);
		bpf_skb_store_bytes(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, ttl), &to, 1, 0);
		return;
	}
	bpf_skb_store_bytes(skb, ETH_HLEN + __builtin_offsetof(struct ipv6hdr, hop_limit), &to, 1, BPF_F_RECOMPUTE_CSUM);
}
