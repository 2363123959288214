/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * For backends: takes the outer header of ipip and gue off, and hands the inner packet to the kernel. Only packets to an
 * address in `local_addresses` are touched, only from sources in `gateways` where that is filled, and what is inside has to be
 * for a network in `local_networks`: a backend is no router for whoever sends it a tunnel packet (CVE-2020-10136).
 *
 * What is no whole and right outer packet is left to the kernel, which knows how to discard it (RFC 1122 3.2.1.2, 4.1.3.4).
 */
#include "wire.h"
#include "frame.h"
#include "csum.h"

struct tunnel_address {
	__u64 hi;
	__u64 lo;
};

/* A longest-prefix key: 96 bits of ::ffff:0:0/96 stand before an IPv4 prefix. */
struct network {
	__u32 length;
	__u8 address[16];
};

/* Per CPU. */
struct decap_counters {
	__u64 ipip;
	__u64 gue;
	__u64 not_allowed; /* dropped: from an address that is no gateway's */
	__u64 not_local;   /* dropped: what is inside is for another host */
	__u64 malformed;   /* dropped: no whole IP packet inside */
	__u64 congested;   /* dropped: marked congested on the way, and the sender does not know ECN (RFC 6040 4.2) */
};

BPF_TABLE("hash", struct tunnel_address, __u32, local_addresses, MAX_ADDRESSES);
BPF_TABLE("percpu_array", __u32, struct decap_counters, decap_counters, 1);
BPF_F_TABLE("lpm_trie", struct network, __u32, gateways, 256, BPF_F_NO_PREALLOC);
BPF_F_TABLE("lpm_trie", struct network, __u32, local_networks, MAX_ADDRESSES, BPF_F_NO_PREALLOC);

#define COUNTER(name) (__builtin_offsetof(struct decap_counters, name) / sizeof(__u64))
#define ECN_MASK 3
#define ECN_NOT_CAPABLE 0
#define ECN_1 1
#define ECN_0 2
#define ECN_CE 3
#define MAX_TAGS 2
#define MAX_IPV4_HEADER 60
#define MAX_DATAGRAM 3584 /* whose checksum is looked at: no larger ones meet native XDP */
#define TUNNEL_ENCAPSULATION_LIMIT 4

struct tunnel {
	struct tunnel_address source;
	struct tunnel_address destination;
	__u32 link_length; /* of Ethernet header and tags */
	__u32 length;      /* of everything to take off behind those */
	__u32 payload;     /* what the outer header says of the length behind it; then, of what is inside */
	__u8 protocol;
	__u8 ecn;
	bool gue;
};

static __always_inline int count(__u32 counter, int action)
{
	__u32 zero = 0;
	struct decap_counters *counters = decap_counters.lookup(&zero);

	asm volatile("" : "+r"(counter)); /* clang merges the calls, and then thinks the check below is needless */
	if (counters && counter < sizeof(*counters) / sizeof(__u64))
		((__u64 *)counters)[counter]++;
	return action;
}

/* A length to compute pointers with. To the verifiers of Linux 6.1 and 6.12 a number whose bytes were swapped has no bounds. */
static __always_inline __u32 wire_length(__be16 field)
{
	__u32 length = be16(field);

	asm volatile("" : "+r"(length));
	return length & 0xffff;
}

static __always_inline bool is_tag(__be16 type)
{
	return type == be16(ETH_P_8021Q) || type == be16(ETH_P_8021AD);
}

/*
 * Pointers into the frame are made anew for each step. The verifier knows of each how far it was checked, and would follow the
 * program's rest apart for every end that a checksum's loop can have.
 */
static __always_inline void *at(struct xdp_md *ctx, __u64 offset)
{
	asm volatile("" : "+r"(offset));
	return frame_start(ctx) + (offset & 127); /* more than the longest headers together */
}

static __always_inline void *outer_header(struct xdp_md *ctx, const struct tunnel *t)
{
	return at(ctx, t->link_length);
}

static __always_inline void *behind_header(struct xdp_md *ctx, const struct tunnel *t)
{
	return at(ctx, t->link_length + t->length);
}

/* Ethernet and up to two tags. The type of what follows; 0 where the frame ends before. */
static __always_inline __be16 parse_link(struct xdp_md *ctx, struct tunnel *t)
{
	struct ethhdr *eth = frame_start(ctx);
	void *end = frame_end(ctx);
	__be16 type;

	if ((void *)(eth + 1) > end)
		return 0;
	t->link_length = sizeof(*eth);
	type = eth->type;
#pragma unroll
	for (int i = 0; i < MAX_TAGS; i++) {
		struct vlan_tag *tag = outer_header(ctx, t);

		if (!is_tag(type))
			break;
		if ((void *)(tag + 1) > end)
			return 0;
		t->link_length += sizeof(*tag);
		type = tag->type;
	}
	return type;
}

/*
 * The checksum of `length` bytes, 8 to `max`, of which `sum` is known already. False where not all are in the frame. What the
 * loop leaves over comes first, out of the last 8 bytes: behind it the verifier would follow each number of rounds apart. The
 * barriers keep the check and the access on one register, and the loop's end where it is.
 */
static __always_inline bool checksum_right(__u64 sum, void *start, __u64 length, const __u32 max, void *end)
{
	__u64 *word, before, last;
	__u32 words;

	words = length / sizeof(*word);
	before = length - sizeof(*word);
	asm volatile("" : "+r"(before)); /* no packet pointer may have a negative fixed part */
	if (before > max - sizeof(*word))
		return false; /* also where `length` is less than a word */
	word = start + before;
	asm volatile("" : "+r"(word));
	if ((void *)(word + 1) > end)
		return false;
	last = (*word >> 8) >> (56 - length % sizeof(*word) * 8);
	sum += (__u32)last + (last >> 32);
	for (int i = 0; i < max / sizeof(*word); i++) {
		asm volatile("" : "+r"(words));
		if (i >= words)
			break;
		word = start;
		asm volatile("" : "+r"(word));
		if ((void *)(word + 1) > end)
			return false;
		sum += (__u32)*word + (*word >> 32);
		start = word + 1;
	}
	sum = (__u32)sum + (sum >> 32);
	sum = (__u32)sum + (sum >> 32);
	return csum_fold(sum) == 0xffff;
}

static __always_inline bool parse_outer_ipv4(struct xdp_md *ctx, struct tunnel *t)
{
	struct ipv4hdr *ip = outer_header(ctx, t);
	void *end = frame_end(ctx);
	__u32 length;

	if ((void *)(ip + 1) > end || ip->version_ihl >> 4 != 4 || ip->fragment & be16(IP_MF | IP_OFFSET))
		return false;
	t->length = (ip->version_ihl & 0x0f) * 4;
	length = wire_length(ip->length);
	if (t->length < sizeof(*ip) || length < t->length || (void *)ip + length > end)
		return false;
	t->payload = length - t->length;
	t->source.lo = (__u64)ip->source << 32 | 0xffff0000;
	t->destination.lo = (__u64)ip->destination << 32 | 0xffff0000;
	t->protocol = ip->protocol;
	t->ecn = ip->tos & ECN_MASK;
	return checksum_right(0, ip, t->length, MAX_IPV4_HEADER, end);
}

/* Over one header of destination options if all that it says is the tunnel encapsulation limit (RFC 2473 5.1). */
static __always_inline bool skip_encapsulation_limit(struct xdp_md *ctx, struct tunnel *t)
{
	struct ipv6_extension *options = behind_header(ctx, t);

	if (t->protocol != IPPROTO_DSTOPTS)
		return true;
	if ((void *)(options + 1) > frame_end(ctx) || t->payload < sizeof(*options) || options->length)
		return false;
	if (options->data[0] != TUNNEL_ENCAPSULATION_LIMIT || options->data[1] != 1)
		return false;
	t->protocol = options->next_header;
	t->length += sizeof(*options);
	t->payload -= sizeof(*options);
	return true;
}

static __always_inline bool parse_outer_ipv6(struct xdp_md *ctx, struct tunnel *t)
{
	struct ipv6hdr *ip = outer_header(ctx, t);
	void *end = frame_end(ctx);

	if ((void *)(ip + 1) > end || *(__u8 *)ip >> 4 != 6)
		return false;
	t->length = sizeof(*ip);
	t->payload = wire_length(ip->payload_length);
	if ((void *)(ip + 1) + t->payload > end)
		return false;
	t->source = (struct tunnel_address){ ip->source[0], ip->source[1] };
	t->destination = (struct tunnel_address){ ip->destination[0], ip->destination[1] };
	t->protocol = ip->next_header;
	t->ecn = be32(ip->version_class_label) >> 20 & ECN_MASK;
	return skip_encapsulation_limit(ctx, t);
}

static __always_inline __u64 sum_address(__u64 sum, const struct tunnel_address *address)
{
	return sum + (__u32)address->hi + (address->hi >> 32) + (__u32)address->lo + (address->lo >> 32);
}

/* An IPv4 address as it is kept here adds 0xffff, which is nothing to this sum. None is as good as a right one (RFC 6935). */
static __always_inline bool udp_checksum_right(const struct tunnel *t, struct udphdr *udp, __u32 length, void *end)
{
	__u64 sum;

	if (!udp->check)
		return true;
	sum = sum_address(sum_address(be16(IPPROTO_UDP) + be16(length), &t->source), &t->destination);
	return checksum_right(sum, udp, length, MAX_DATAGRAM, end);
}

/* Is it a tunnel packet? GUE variant 1 has the IP packet right behind the UDP header. */
static __always_inline bool parse_tunnel(struct xdp_md *ctx, struct tunnel *t)
{
	struct udphdr *udp = behind_header(ctx, t);
	void *end = frame_end(ctx);
	__u32 length;

	if (t->protocol == IPPROTO_IPIP || t->protocol == IPPROTO_IPV6)
		return true;
	if (t->protocol != IPPROTO_UDP || (void *)(udp + 1) > end || udp->destination != be16(GUE_PORT))
		return false;
	length = wire_length(udp->length);
	if (length < sizeof(*udp) || length > t->payload)
		return false;
	t->length += sizeof(*udp);
	t->payload = length - sizeof(*udp);
	t->gue = true;
	return udp_checksum_right(t, udp, length, end);
}

static __always_inline bool from_gateway(const struct tunnel *t)
{
	struct network key = { .length = 128 };

	if (!ONLY_GATEWAYS)
		return true;
	__builtin_memcpy(key.address, &t->source, sizeof(t->source));
	return gateways.lookup(&key) != NULL;
}

/*
 * Is there an IP packet inside, no longer than the outer one says? What IPIP's or IPv6's protocol number announces has to be
 * one. `destination` is whom it is for.
 */
static __always_inline bool parse_inner(struct xdp_md *ctx, const struct tunnel *t, struct tunnel_address *destination)
{
	struct ipv4hdr *ip4 = behind_header(ctx, t);
	struct ipv6hdr *ip6 = (void *)ip4;
	void *end = frame_end(ctx);
	__u32 length;

	if ((void *)(ip4 + 1) > end || t->payload < sizeof(*ip4))
		return false;
	if (ip4->version_ihl >> 4 == 4) {
		length = wire_length(ip4->length);
		*destination = (struct tunnel_address){ 0, (__u64)ip4->destination << 32 | 0xffff0000 };
		return (ip4->version_ihl & 0x0f) * 4 >= sizeof(*ip4) && length >= (ip4->version_ihl & 0x0f) * 4 &&
		       length <= t->payload && t->protocol != IPPROTO_IPV6;
	}
	if (ip4->version_ihl >> 4 != 6 || (void *)(ip6 + 1) > end)
		return false;
	*destination = (struct tunnel_address){ ip6->destination[0], ip6->destination[1] };
	return sizeof(*ip6) + wire_length(ip6->payload_length) <= t->payload && t->protocol != IPPROTO_IPIP;
}

static __always_inline bool is_local(const struct tunnel_address *destination)
{
	struct network key = { .length = 128 };

	__builtin_memcpy(key.address, destination, sizeof(*destination));
	return local_networks.lookup(&key) != NULL;
}

/* RFC 6040 4.2: the inner ECN field after the outer one; below 0 where the packet must be dropped. */
static __always_inline int combine_ecn(__u8 inner, __u8 outer)
{
	if (outer == ECN_CE)
		return inner == ECN_NOT_CAPABLE ? -1 : ECN_CE;
	return inner == ECN_0 && outer == ECN_1 ? ECN_1 : inner;
}

/* A congestion mark of the tunnel must reach the receiver, or the packet must not. */
static __always_inline bool carry_congestion(struct xdp_md *ctx, const struct tunnel *t)
{
	struct ipv4hdr *ip4 = behind_header(ctx, t);
	struct ipv6hdr *ip6 = (void *)ip4;
	__u16 *first_word = (void *)ip4, old;
	void *end = frame_end(ctx);
	__u8 inner;
	int ecn;

	if ((void *)(ip4 + 1) > end)
		return false;
	if (ip4->version_ihl >> 4 == 4) {
		ecn = combine_ecn(ip4->tos & ECN_MASK, t->ecn);
		if (ecn < 0)
			return false;
		old = *first_word;
		ip4->tos = (ip4->tos & ~ECN_MASK) | ecn;
		ip4->check = csum_apply(ip4->check, csum_change16(0, old, *first_word));
		return true;
	}
	if ((void *)(ip6 + 1) > end)
		return false;
	inner = be32(ip6->version_class_label) >> 20 & ECN_MASK;
	ecn = combine_ecn(inner, t->ecn);
	if (ecn < 0)
		return false;
	ip6->version_class_label ^= be32((__u32)(inner ^ ecn) << 20);
	return true;
}

/* Moves the link layer's header, with its tags, to what is inside. False where the frame is unusable now. */
static __always_inline bool take_off(struct xdp_md *ctx, const struct tunnel *t, __be16 type)
{
	struct ethhdr *eth = frame_start(ctx);
	__u64 macs_first, tag_words;
	__u32 macs_last;

	if ((void *)(eth + 1) + MAX_TAGS * sizeof(struct vlan_tag) > frame_end(ctx))
		return false;
	macs_first = *(__u64 *)eth->macs;
	macs_last = *(__u32 *)(eth->macs + 8);
	tag_words = *(__u64 *)&eth->type;
	if (bpf_xdp_adjust_head(ctx, t->length))
		return false;
	eth = frame_start(ctx);
	if ((void *)(eth + 1) + MAX_TAGS * sizeof(struct vlan_tag) > frame_end(ctx))
		return false;
	*(__u64 *)eth->macs = macs_first;
	*(__u32 *)(eth->macs + 8) = macs_last;
	if (t->link_length == sizeof(*eth)) {
		eth->type = type;
	} else if (t->link_length == sizeof(*eth) + sizeof(struct vlan_tag)) {
		*(__u32 *)&eth->type = tag_words;
		*(&eth->type + 2) = type;
	} else {
		*(__u64 *)&eth->type = tag_words;
		*(&eth->type + 4) = type;
	}
	return true;
}

int xdplb_decap(struct xdp_md *ctx)
{
	struct tunnel_address destination = {};
	struct tunnel t = {};
	__be16 type = parse_link(ctx, &t);

	if (type == be16(ETH_P_IP) ? !parse_outer_ipv4(ctx, &t) : type != be16(ETH_P_IPV6) || !parse_outer_ipv6(ctx, &t))
		return XDP_PASS;
	if (!parse_tunnel(ctx, &t) || !local_addresses.lookup(&t.destination))
		return XDP_PASS;
	if (!parse_inner(ctx, &t, &destination))
		return t.gue ? XDP_PASS : count(COUNTER(malformed), XDP_DROP); /* UDP to that port can be anything */
	if (!from_gateway(&t))
		return count(COUNTER(not_allowed), XDP_DROP);
	if (!is_local(&destination))
		return count(COUNTER(not_local), XDP_DROP);
	if (!carry_congestion(ctx, &t))
		return count(COUNTER(congested), XDP_DROP);
	type = destination.hi == 0 && (__u32)destination.lo == 0xffff0000 ? be16(ETH_P_IP) : be16(ETH_P_IPV6);
	if (!take_off(ctx, &t, type))
		return count(COUNTER(malformed), XDP_DROP);
	return count(t.gue ? COUNTER(gue) : COUNTER(ipip), XDP_PASS);
}
