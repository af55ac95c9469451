/* SPDX-License-Identifier: Apache-2.0 */
/*
 * IPIP (RFC 2003): an IPv4 header of protocol 4 before an inner IPv4 packet, without ports
 * and without a checksum over the payload. So any inner packet can be carried, fragments
 * too. Outer packets have DF set, as those of the kernel's ipip device and of the userspace
 * datapath have.
 */

#define COST_IPIP 20

// A router before a narrower link drops what is too long and has DF set, and says so
// (RFC 1191). The way below learns the path MTU from that, and user space asks for it every
// few seconds. Until then what may be too long for the peer is left to the way below.
#define MIN_PATH_MTU 552       // net.ipv4.route.min_pmtu
#define DOUBT 20000000000ll    // ns
#define DOUBTS 256

// When a router last said that of a peer, ns. Peers may share an entry.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, DOUBTS);
	__type(key, __u32);
	__type(value, __u64);
} doubts SEC(".maps");

inline_always __u64 *doubt_of(__be32 peer)
{
	__u32 at = peer * 0x9e3779b1u >> 24;

	return bpf_map_lookup_elem(&doubts, &at);
}

// too_long says whether an outer packet is longer than the path MTU, or may be.
inline_always int too_long(const struct peer *p, __u32 length)
{
	__u64 *doubt;

	if (length > p->mtu)
		return 1;
	if (length <= MIN_PATH_MTU)
		return 0;
	doubt = doubt_of(p->outer.word[0]);
	return doubt && *doubt && (__s64)(clock() - *doubt) < DOUBT; // clocks of processors differ
}

// told reads an ICMP error that quotes one of our outer packets. It goes on to the host,
// whatever it says.
inline_always void told(struct __sk_buff *skb)
{
	struct {
		__u8 type, code;
		__be16 check, unused, mtu;
		struct iphdr quoted;
	} icmp;
	__u32 family = 4;
	struct tunnel *t = bpf_map_lookup_elem(&tunnels, &family);
	__u64 *doubt;

	if (!t || !t->ipip || bpf_skb_load_bytes(skb, ETH_HLEN + sizeof(struct iphdr), &icmp, sizeof(icmp)))
		return;
	if (icmp.type != 3 || icmp.code != 4 || icmp.quoted.protocol != IPPROTO_IPIP || icmp.quoted.saddr != t->local.word[0])
		return;
	doubt = doubt_of(icmp.quoted.daddr);
	if (doubt)
		*doubt = clock();
}

inline_always int out_ipip(struct __sk_buff *skb, __u32 gso, const struct tunnel *t, const struct peer *p, int at, const struct inner4 *in)
{
	const struct iphdr ip = in->ip;
	struct flow *f = 0;
	struct iphdr h;
	__u32 length = skb->len - at, each = length, n = 1;
	int fragment;

	fragment = ip.frag_off & bpf_htons(0x3fff);
	if (t->process) {
		struct address source = { .word = { ip.saddr } }, destination = { .word = { ip.daddr } };

		f = flow_of(&source, &destination, ports4(in));
		if (kept(f))
			return slow(SLOW_OUT_FLOW);
	}
	if (gso) {
		each = fragment ? 0 : segment_length(gso, ip.protocol, &in->on, ip.ihl * 4);
		if (!each || length + COST_IPIP > 0xffff)
			return left(f, SLOW_OUT_SEGMENTS);
		n = segments(skb);
	} else if (bpf_ntohs(ip.tot_len) != length) {
		return left(f, SLOW_OUT_LENGTH);
	}
	if (too_long(p, each + COST_IPIP))
		return left(f, SLOW_OUT_LENGTH);
	if (bpf_skb_adjust_room(skb, COST_IPIP, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4))
		return left(f, SLOW_OUT_ROOM);
	// The kernel's ipip device numbers packets and copies the TTL; a raw socket, as the
	// userspace datapath has, does neither.
	h = (struct iphdr){
		.version = 4, .ihl = 5, .tos = ecn(ip.tos), .tot_len = bpf_htons(length + COST_IPIP), .id = t->process ? 0 : identification(n),
		.frag_off = bpf_htons(0x4000), .ttl = t->hops ? t->hops : ip.ttl, .protocol = IPPROTO_IPIP,
		.saddr = t->local.word[0], .daddr = p->outer.word[0],
	};
	h.check = ~fold(sum(&h, sizeof(h)));
	if (bpf_skb_store_bytes(skb, at, &h, sizeof(h), 0))
		return TC_ACT_SHOT; // cannot be: the room is there
	return leaves(skb, t, at, n, length);
}

inline_always int in_ipip(struct __sk_buff *skb, __u32 gso)
{
	struct iphdr h;
	struct inner4 in;
	struct address source = {}, outer = {}, destination = {};
	struct ethernet ethernet;
	struct passage passage = {}, *w = &passage; // there is no short way
	__u32 family = 4, length, way, packets = segments(skb);
	int class, verdict;
	struct traffic *from;
	struct tunnel *t;
	struct flow *f;

	t = bpf_map_lookup_elem(&tunnels, &family);
	if (!t || !t->ipip || t->uplink != skb->ifindex || bpf_skb_load_bytes(skb, 0, &ethernet, sizeof(ethernet)) ||
	    bpf_skb_load_bytes(skb, ETH_HLEN, &h, sizeof(h)))
		return TC_ACT_UNSPEC;
	if (h.daddr != t->local.word[0] || skb->vlan_present)
		return TC_ACT_UNSPEC;
	outer.word[0] = h.saddr;
	if (h.frag_off & bpf_htons(0x3fff)) { // of any flow
		if (!(h.frag_off & bpf_htons(0x1fff)))
			not_read(&outer);
		return slow(SLOW_IN_FRAGMENT);
	}
	if (h.version != 4 || fold(sum(&h, sizeof(h))) != 0xffff)
		return slow(SLOW_IN_OPTIONS);
	length = skb->len - ETH_HLEN;
	if (bpf_ntohs(h.tot_len) != length)
		return slow(SLOW_IN_LENGTH);
	if (!read4(skb, ETH_HLEN + COST_IPIP, &in))
		return slow(SLOW_IN_HEADER);
	length -= COST_IPIP;
	source.word[0] = in.ip.saddr;
	destination.word[0] = in.ip.daddr;
	f = flow_of(&source, &destination, ports4(&in));
	if (left_at_once(gso, f))
		return left(f, SLOW_IN_SEGMENTS);
	from = known(t, &outer, &source);
	if (!from)
		return slow(SLOW_IN_SOURCE);
	if (!ours(t, &destination))
		return slow(SLOW_IN_DESTINATION);
	// VXLAN's outer checksum covers the inner header. Here nothing does.
	if (in.ip.ihl != 5 || fold(sum(&in.ip, sizeof(in.ip))) != 0xffff)
		return left(f, SLOW_IN_HEADER);
	class = decapsulated(h.tos, in.ip.tos);
	if (class < 0)
		return left(NULL, SLOW_IN_ECN);
	if (bpf_ntohs(in.ip.tot_len) != length)
		return left(f, SLOW_IN_LENGTH);
	if (follows_unread(&outer))
		return left(f, SLOW_IN_FLOW);
	way = way_of(gso, t, f, in.ip.protocol == IPPROTO_TCP, length, 0);
	if (way == SLOW)
		return slow(SLOW_IN_FLOW);
	if (gso && way == DIRECT)
		return left(f, SLOW_IN_SEGMENTS);
	// No checksum is outside, so what is known of the inner one stays.
	if (way == JOINED)
		joining(f, payload_of(&in.on, length - in.ip.ihl * 4));
	if (bpf_skb_adjust_room(skb, -COST_IPIP, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET))
		return left(f, SLOW_IN_ROOM);
	__builtin_memcpy(ethernet.destination, t->mac, ETH_ALEN); // for the pair of veth
	verdict = enters(skb, t, &ethernet, NULL, w, way, from, packets, length);
	if (class != (in.ip.tos & 3))
		set_ecn4(skb, in.ip.tos, class);
	return verdict;
}
