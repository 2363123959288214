/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * For backends: takes the outer header of ipip and gue off, and hands the inner packet to the kernel. Only packets to an
 * address in `local_addresses` are touched, and only from sources in `gateways` where that is filled; everything else passes.
 */
#include "wire.h"
#include "frame.h"
#include "csum.h"

struct tunnel_address {
	__u64 hi;
	__u64 lo;
};

/* A longest-prefix key: 96 bits of ::ffff:0:0/96 stand before an IPv4 prefix. */
struct gateway_prefix {
	__u32 length;
	__u8 address[16];
};

/* Per CPU. */
struct decap_counters {
	__u64 ipip;
	__u64 gue;
	__u64 not_allowed; /* dropped: from an address that is no gateway's */
	__u64 malformed;   /* dropped: no whole IP header inside */
	__u64 congested;   /* dropped: marked congested on the way, and the sender does not know ECN (RFC 6040 4.2) */
};

BPF_TABLE("hash", struct tunnel_address, __u32, local_addresses, 256);
BPF_TABLE("percpu_array", __u32, struct decap_counters, decap_counters, 1);
BPF_F_TABLE("lpm_trie", struct gateway_prefix, __u32, gateways, 256, BPF_F_NO_PREALLOC);

#define COUNTER(name) (__builtin_offsetof(struct decap_counters, name) / sizeof(__u64))
#define ECN_MASK 3
#define ECN_NOT_CAPABLE 0
#define ECN_1 1
#define ECN_0 2
#define ECN_CE 3

struct tunnel {
	struct tunnel_address source;
	struct tunnel_address destination;
	void *inner;
	__u32 length; /* of everything to take off, behind the Ethernet header */
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

static __always_inline bool parse_outer_ipv4(void *start, void *end, struct tunnel *t)
{
	struct ipv4hdr *ip = start;

	if ((void *)(ip + 1) > end || ip->version_ihl != 0x45 || ip->fragment & be16(IP_MF | IP_OFFSET))
		return false;
	t->source.lo = (__u64)ip->source << 32 | 0xffff0000;
	t->destination.lo = (__u64)ip->destination << 32 | 0xffff0000;
	t->protocol = ip->protocol;
	t->ecn = ip->tos & ECN_MASK;
	t->inner = ip + 1;
	t->length = sizeof(*ip);
	return true;
}

static __always_inline bool parse_outer_ipv6(void *start, void *end, struct tunnel *t)
{
	struct ipv6hdr *ip = start;

	if ((void *)(ip + 1) > end)
		return false;
	t->source = (struct tunnel_address){ ip->source[0], ip->source[1] };
	t->destination = (struct tunnel_address){ ip->destination[0], ip->destination[1] };
	t->protocol = ip->next_header;
	t->ecn = be32(ip->version_class_label) >> 20 & ECN_MASK;
	t->inner = ip + 1;
	t->length = sizeof(*ip);
	return true;
}

/* Is it a tunnel packet? GUE variant 1 has the IP packet right behind the UDP header. */
static __always_inline bool parse_tunnel(void *end, struct tunnel *t)
{
	struct udphdr *udp = t->inner;

	if (t->protocol == IPPROTO_IPIP || t->protocol == IPPROTO_IPV6)
		return true;
	if (t->protocol != IPPROTO_UDP || (void *)(udp + 1) > end || udp->destination != be16(GUE_PORT))
		return false;
	t->inner = udp + 1;
	t->length += sizeof(*udp);
	t->gue = true;
	return true;
}

static __always_inline bool from_gateway(const struct tunnel *t)
{
	struct gateway_prefix key = { .length = 128 };

	if (!ONLY_GATEWAYS)
		return true;
	__builtin_memcpy(key.address, &t->source, sizeof(t->source));
	return gateways.lookup(&key) != NULL;
}

/* The length of the inner IP header (of IPv4's without options); 0 where there is none. */
static __always_inline __u32 inner_header_length(const struct tunnel *t, void *end)
{
	const __u8 *first = t->inner;

	if ((void *)(first + 1) > end)
		return 0;
	return *first >> 4 == 4 ? sizeof(struct ipv4hdr) : *first >> 4 == 6 ? sizeof(struct ipv6hdr) : 0;
}

/* RFC 6040 4.2: the inner ECN field after the outer one; below 0 where the packet must be dropped. */
static __always_inline int combine_ecn(__u8 inner, __u8 outer)
{
	if (outer == ECN_CE)
		return inner == ECN_NOT_CAPABLE ? -1 : ECN_CE;
	return inner == ECN_0 && outer == ECN_1 ? ECN_1 : inner;
}

/* A congestion mark of the tunnel must reach the receiver, or the packet must not. */
static __always_inline bool carry_congestion(const struct tunnel *t, void *end)
{
	struct ipv4hdr *ip4 = t->inner;
	struct ipv6hdr *ip6 = t->inner;
	__u16 *first_word = t->inner, old;
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

int xdplb_decap(struct xdp_md *ctx)
{
	void *end = frame_end(ctx);
	struct ethhdr *eth = frame_start(ctx);
	struct tunnel t = {};
	__u64 macs_first;
	__u32 macs_last;
	__u32 header_length;

	if ((void *)(eth + 1) > end)
		return XDP_PASS;
	if (eth->type == be16(ETH_P_IP) ? !parse_outer_ipv4(eth + 1, end, &t)
					: eth->type != be16(ETH_P_IPV6) || !parse_outer_ipv6(eth + 1, end, &t))
		return XDP_PASS;
	if (!parse_tunnel(end, &t) || !local_addresses.lookup(&t.destination))
		return XDP_PASS;
	if (!from_gateway(&t))
		return count(COUNTER(not_allowed), XDP_DROP);
	header_length = inner_header_length(&t, end);
	if (!header_length || t.inner + header_length > end)
		return count(COUNTER(malformed), XDP_DROP);
	if (!carry_congestion(&t, end))
		return count(COUNTER(congested), XDP_DROP);

	macs_first = *(__u64 *)eth->macs;
	macs_last = *(__u32 *)(eth->macs + 8);
	if (bpf_xdp_adjust_head(ctx, t.length))
		return count(COUNTER(malformed), XDP_DROP);
	eth = frame_start(ctx);
	if ((void *)(eth + 1) > frame_end(ctx))
		return XDP_DROP;
	*(__u64 *)eth->macs = macs_first;
	*(__u32 *)(eth->macs + 8) = macs_last;
	eth->type = header_length == sizeof(struct ipv4hdr) ? be16(ETH_P_IP) : be16(ETH_P_IPV6);
	return count(t.gue ? COUNTER(gue) : COUNTER(ipip), XDP_PASS);
}
