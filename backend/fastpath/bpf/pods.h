/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The short way from pod to pod, for TCP and UDP without NAT:
 *
 *	culvert_pod_out  ingress of the host's end of a pod's veth: encapsulates there, and
 *	                 sends to the uplink, past the bridge, the routes and the netfilter hooks
 *	culvert_pod_in   egress of that end: sees what arrives by the host's way
 *
 * and culvert_in hands a packet to the pod's end of the veth itself.
 *
 * A flow takes the host's way until user space has found it in conntrack and entered it
 * in `shortcuts`: a TCP connection, once established, in both directions, and each direction
 * of UDP by itself. From then on a direction is short
 * for LIFE after one of its packets has passed the host's way from end to end,
 * unchanged. Then its next packets take the host's way again, and renew it when they come
 * out. So whatever the host decides of a flow (a rule, a route, a pod that is gone)
 * holds at most LIFE later, by whatever program it was decided.
 *
 * A direction becomes short when the last packet that was given to the host's way is the
 * last one that came out of it, so no packet overtakes another. TCP packets are told
 * apart by the end of their sequence numbers and their acknowledgement: GRO and
 * segmentation leave those of the last one as they are. UDP has no such numbers, and datagrams may
 * be alike: so they are counted, too.
 *
 * The host's way ends in the queue of a veth, from which the pod receives. A packet of
 * the short way does not wait in a queue, and would overtake those. So the packets of a flow in
 * `shortcuts` that come out of the host's way wait in a queue whose end a program sees
 * (into_queue), and the short way goes by that queue as long as there are any.
 */

#define LIFE 240000000ull    // ns: with a tick of the clock, 250 ms
#define RECOUNT 1000000000ull // ns

struct flow_key {
	struct address source, destination;
	__be16 source_port, destination_port;
	__u32 protocol;
};

// Where a packet is in its flow. TCP: the end of its sequence numbers, and what it
// acknowledges. UDP: its length, and its identification and first bytes, mixed.
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
	__u64 since;        // when it has begun to take the host's way, ns
	__u32 generation;   // of the host's state, when it was made or renewed
	__u32 link;         // the host's end of the pod's veth
	struct position given; // the farthest packet given to the host's way
	__s32 away;         // UDP: packets given to the host's way since then that have not come out
	__u32 queued;       // in: the number of the last packet that entered the queue before the pod's link,
	__u32 unqueued;     // and of the last one that left it
	struct ethernet ethernet; // out: of the inner packet to the peer; in: of the packet to the pod
	__u8 bridge[ETH_ALEN];    // out: where the pod sends its packets
	__u8 gave;                // given is set
	__u8 pad[7];
};

// What the programs tell user space of a flow that is not in shortcuts.
struct candidate {
	struct flow_key key;
	__u32 family, link;
	__u8 pod[ETH_ALEN], bridge[ETH_ALEN];
};

// Packets of a flow. Flows may share a count.
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

#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16

// A TCP or UDP packet, from its headers.
struct segment {
	struct flow_key key;
	struct position position;
	__u32 family;
	__u8 flags, hops; // flags: of TCP
	__u8 fragment;    // the first one
};

// transport_of reads what follows the IP header, and is length bytes long.
inline_always int transport_of(const union transport *on, __u32 length, __u32 identification, struct segment *s)
{
	const struct tcp *tcp = &on->tcp;

	if (s->key.protocol == IPPROTO_TCP) {
		if (length < sizeof(*tcp) || tcp->offset < 5 << 4)
			return 0;
		s->flags = tcp->flags;
		s->position.end = bpf_ntohl(tcp->sequence) + length - (tcp->offset >> 4) * 4;
		s->position.acknowledged = bpf_ntohl(tcp->acknowledgement);
	} else if (s->key.protocol == IPPROTO_UDP) {
		// Length and checksum are where TCP has its sequence number, and the payload follows. The
		// host may finish a checksum that was left to hardware.
		if (length < sizeof(on->udp))
			return 0;
		s->flags = TCP_ACK;
		s->position.end = bpf_ntohl(tcp->sequence) >> 16;
		s->position.acknowledged = tcp->acknowledgement ^ identification << 16 ^
					   ((__u32)tcp->window << 16 | tcp->offset << 8 | tcp->flags) * 0x9e3779b1u;
	} else {
		return 0;
	}
	s->key.source_port = tcp->source_port;
	s->key.destination_port = tcp->destination_port;
	return 1;
}

// segment4 makes a segment of an inner packet, length bytes long, and its headers. False for
// protocols other than TCP and UDP, later fragments, and packets with IP options or extension headers.
inline_always int segment4(const struct inner4 *h, __u32 length, struct segment *s)
{
	if (h->ip.ihl != 5 || (h->ip.frag_off & bpf_htons(0x1fff)))
		return 0;
	s->family = 4;
	s->hops = h->ip.ttl;
	s->fragment = !!(h->ip.frag_off & bpf_htons(0x2000));
	s->key.source = (struct address){ { h->ip.saddr } };
	s->key.destination = (struct address){ { h->ip.daddr } };
	s->key.protocol = h->ip.protocol;
	return transport_of(&h->on, length - sizeof(h->ip), h->ip.id, s);
}

inline_always int segment6(struct __sk_buff *skb, int at, const struct inner6 *h, __u32 length, struct segment *s)
{
	union transport on = h->on;

	length -= sizeof(h->ip);
	s->family = 6;
	s->hops = h->ip.hop_limit;
	s->fragment = 0;
	__builtin_memcpy(&s->key.source, &h->ip.saddr, 16);
	__builtin_memcpy(&s->key.destination, &h->ip.daddr, 16);
	s->key.protocol = h->ip.nexthdr;
	if (h->ip.nexthdr == IPPROTO_FRAGMENT) {
		struct {
			__u8 next, reserved;
			__be16 offset;
			__be32 identification;
			union transport on;
		} f = {};

		if (bpf_skb_load_bytes(skb, at + sizeof(h->ip), &f, sizeof(f)) &&
		    bpf_skb_load_bytes(skb, at + sizeof(h->ip), &f, sizeof(f) - sizeof(f.on) + sizeof(f.on.udp)))
			return 0;
		if (f.offset & bpf_htons(0xfff8))
			return 0;
		s->key.protocol = f.next;
		s->fragment = 1;
		on = f.on;
		length -= 8;
	}
	return transport_of(&on, length, 0, s);
}

// segment_of is both for an Ethernet frame, whose headers it reads.
inline_always int segment_of(struct __sk_buff *skb, union inner *h, struct segment *s)
{
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return read4(skb, ETH_HLEN, &h->four) && segment4(&h->four, skb->len - ETH_HLEN, s);
	if (skb->protocol == bpf_htons(ETH_P_IPV6))
		return read6(skb, ETH_HLEN, &h->six) && segment6(skb, ETH_HLEN, &h->six, skb->len - ETH_HLEN, s);
	return 0;
}

// is_valid says whether a packet of the flow may take the shortcut.
inline_always int is_valid(const struct shortcut *c, const struct segment *s)
{
	return c->until && (__s64)(c->until - clock()) > 0 && c->generation == generation() && !s->fragment &&
	       (s->flags & (TCP_SYN | TCP_FIN | TCP_RST | TCP_ACK)) == TCP_ACK && s->hops > 1;
}

// give notes that a packet takes the host's way.
inline_always void give(struct shortcut *c, const struct segment *s)
{
	if (c->until || !c->gave) { // so there was nothing of it on that way
		c->until = 0;
		c->since = clock();
		c->away = 0;
	}
	if (s->fragment) { // what comes out of the host's way is not to be told apart: the next whole packet is
		c->gave = 0;
		return;
	}
	__sync_fetch_and_add(&c->away, 1);
	if (s->key.protocol == IPPROTO_TCP && c->gave && !beyond(&s->position, &c->given)) // sent again
		return;
	c->given = s->position;
	c->gave = 1;
}

// passed notes that a packet has come out of the host's way, and makes its direction
// short if nothing else is on that way. If the host has lost one, the counts of UDP
// differ until RECOUNT is over.
inline_always void passed(struct __sk_buff *skb, struct shortcut *c, const struct segment *s)
{
	__u64 now;

	if (c->until || !c->gave || s->fragment)
		return;
	__sync_fetch_and_add(&c->away, -1);
	if (!same_position(&c->given, &s->position))
		return;
	now = clock();
	if (s->key.protocol == IPPROTO_UDP && c->away && now - c->since < RECOUNT)
		return;
	if (bpf_skb_load_bytes(skb, 0, &c->ethernet, sizeof(c->ethernet)))
		return;
	c->generation = generation();
	c->until = now + LIFE;
}

// ended forgets a connection that is being closed: conntrack must see the rest of it.
inline_always void ended(const struct segment *s)
{
	struct flow_key back = {
		.source = s->key.destination, .destination = s->key.source,
		.source_port = s->key.destination_port, .destination_port = s->key.source_port,
		.protocol = s->key.protocol,
	};

	bpf_map_delete_elem(&shortcuts, &s->key);
	bpf_map_delete_elem(&shortcuts, &back);
}

// propose tells user space of a flow at its 32nd packet, its 64th and so on.
inline_always void propose(struct __sk_buff *skb, const struct segment *s, const __u8 *pod, const __u8 *bridge)
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
	__builtin_memcpy(c->pod, pod, ETH_ALEN);
	__builtin_memcpy(c->bridge, bridge, ETH_ALEN);
	bpf_ringbuf_submit(c, 0);
}

// into_pod hands a packet to the pod's end of a veth, as received there, at once: the
// host's end is `link`. What it bears of the host is taken off it, as where it crosses a veth.
inline_always int into_pod(struct __sk_buff *skb, __u32 link)
{
	skb->mark = 0;
	skb->priority = 0;
	return bpf_redirect_peer(link, 0);
}

// into_queue has a packet wait with those of its flow that have come out of the host's
// way: culvert_join takes them out of the queue of this CPU (netif_rx), and hands them to
// into_pod. The marks stay with the packet, and nobody else sees them.
inline_always int into_queue(struct __sk_buff *skb, const struct tunnel *t, struct shortcut *c)
{
	__u32 n = c->queued + 1;

	c->queued = n;
	skb->mark = c->link;
	skb->priority = n;
	return bpf_redirect(t->queue, BPF_F_INGRESS);
}

// one_hop decrements the TTL, as ip_decrease_ttl does.
inline_always void one_hop(struct iphdr *ip)
{
	__u32 check = (__u32)ip->check + bpf_htons(0x0100);

	ip->check = check + (check >= 0xffff);
	ip->ttl--;
}

// set_hops changes the hop limit of the IPv6 packet behind the Ethernet header.
inline_always void set_hops(struct __sk_buff *skb, __u8 to)
{
	bpf_skb_store_bytes(skb, ETH_HLEN + __builtin_offsetof(struct ipv6hdr, hop_limit), &to, 1, BPF_F_RECOMPUTE_CSUM);
}
