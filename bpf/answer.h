/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Answers that the balancer gives itself, with the service's address for their source: a TCP reset (RFC 9293 3.5.2), ICMP
 * "port unreachable", and ICMP "too big". They are made out of the packet that they answer.
 */
#ifndef XDPLB_ANSWER_H
#define XDPLB_ANSWER_H

#include "count.h"
#include "csum.h"
#include "parse.h"
#include "rewrite.h"

#define ANSWER_TTL 64
#define MAX_QUOTE 128 /* bytes of the packet in an ICMP error, beginning with its IP header */
#define ICMP_UNREACHABLE 3
#define ICMP_PORT_UNREACHABLE 3
#define ICMP_FRAGMENTATION_NEEDED 4
#define ICMPV6_UNREACHABLE 1
#define ICMPV6_PORT_UNREACHABLE 4
#define ICMPV6_TOO_BIG 2

/*
 * RFC 1122 3.2.2: never an error about an error, about a later fragment, about what the link layer sent to many, or to a
 * sender that is not one host. Of ICMP only errors get here.
 */
static __always_inline bool answerable(const struct packet *p)
{
	const struct ethhdr *eth = frame_start(p->ctx);
	const __u8 *source = p->version == 4 ? (__u8 *)&p->ip4->source : (__u8 *)p->ip6->source;

	if ((void *)(eth + 1) > p->end || eth->macs[0] & 1)
		return false;
	if (is_icmp(p) || p->fragment == LATER_FRAGMENT)
		return false;
	if (p->version == 4)
		return source[0] != 0 && source[0] != 127 && source[0] < 224;
	return source[0] != 0xff && (p->source.hi || p->source.lo & ~(1ULL << 56)); /* :: and ::1 */
}

/* Cuts the frame off after `length` bytes of IP packet. Everything read from the packet before is stale then. */
static __always_inline bool cut(struct xdp_md *ctx, __u32 link_length, __u32 length)
{
	long have = frame_end(ctx) - frame_start(ctx);
	int surplus = have - (link_length + length);

	return surplus == 0 || !bpf_xdp_adjust_tail(ctx, -surplus);
}

static __always_inline __u64 pseudo_header(const struct address *a, const struct address *b, __u32 protocol, __u32 length)
{
	struct address zero = {};
	__u64 sum = csum_change_address(0, &zero, a);

	sum = csum_change_address(sum, &zero, b);
	return sum + be16(protocol) + be16(length);
}

static __always_inline void write_ipv4(struct ipv4hdr *ip, __be32 source, __be32 destination, __u8 protocol, __u32 length)
{
	__u64 sum;

	ip->version_ihl = 0x45;
	ip->tos = 0;
	ip->length = be16(length);
	ip->id = 0;
	ip->fragment = be16(IP_DF);
	ip->ttl = ANSWER_TTL;
	ip->protocol = protocol;
	ip->source = source;
	ip->destination = destination;
	sum = be16(0x4500) + be16(length) + be16(IP_DF) + be16(ANSWER_TTL << 8 | protocol);
	ip->check = ~csum_fold(csum_add32(csum_add32(sum, source), destination));
}

static __always_inline void write_ipv6(struct ipv6hdr *ip, const struct address *source, const struct address *destination,
				       __u8 protocol, __u32 payload_length)
{
	ip->version_class_label = be32(0x60000000);
	ip->payload_length = be16(payload_length);
	ip->next_header = protocol;
	ip->hop_limit = ANSWER_TTL;
	ip->source[0] = source->hi;
	ip->source[1] = source->lo;
	ip->destination[0] = destination->hi;
	ip->destination[1] = destination->lo;
}

/* `p` with its addresses exchanged, as source and destination of a fresh IP header at `network`. */
static __always_inline void write_reverse_ip(const struct packet *p, void *network, __u8 protocol, __u32 payload_length)
{
	if (p->version == 4)
		write_ipv4(network, unmapped(&p->destination), unmapped(&p->source), protocol,
			   sizeof(struct ipv4hdr) + payload_length);
	else
		write_ipv6(network, &p->destination, &p->source, protocol, payload_length);
}

static __always_inline __u32 ip_header_length(const struct packet *p)
{
	return p->version == 4 ? sizeof(struct ipv4hdr) : sizeof(struct ipv6hdr);
}

/* What the sender of a segment believes to be the next byte: a reset counts only with the right sequence number. */
static __always_inline void write_reset(struct tcphdr *reset, const struct tcphdr *segment, __u32 payload)
{
	__u32 sequence = be32(segment->sequence) + payload + !!(segment->flags & TCP_SYN) + !!(segment->flags & TCP_FIN);

	reset->source = segment->destination;
	reset->destination = segment->source;
	reset->data_offset = (sizeof(*reset) / 4) << 4;
	if (segment->flags & TCP_ACK) {
		reset->sequence = segment->acknowledgement;
		reset->acknowledgement = 0;
		reset->flags = TCP_RST;
	} else {
		reset->sequence = 0;
		reset->acknowledgement = be32(sequence);
		reset->flags = TCP_RST | TCP_ACK;
	}
	reset->window = 0;
	reset->check = 0;
	reset->urgent = 0;
}

static __always_inline int answer_reset(struct packet *p)
{
	const __u32 ip_length = ip_header_length(p);
	struct tcphdr *segment = p->transport, reset = {}, *out;
	struct xdp_md *ctx = p->ctx;
	struct ethhdr *eth;
	void *network;
	__u64 sum;

	write_reset(&reset, segment, p->transport_length - (segment->data_offset >> 4) * 4);
	sum = pseudo_header(&p->source, &p->destination, IPPROTO_TCP, sizeof(reset));
#pragma unroll
	for (int i = 0; i < sizeof(reset) / 4; i++)
		sum = csum_add32(sum, ((__u32 *)&reset)[i]);
	reset.check = ~csum_fold(sum);

	if (!cut(ctx, p->link_length, ip_length + sizeof(reset)))
		return verdict(XDP_ABORTED);
	eth = frame_start(ctx);
	p->end = frame_end(ctx);
	network = (void *)eth + p->link_length;
	out = network + ip_length;
	if ((void *)(eth + 1) > p->end || (void *)(out + 1) > p->end)
		return verdict(XDP_ABORTED);
	swap_macs(eth);
	write_reverse_ip(p, network, IPPROTO_TCP, sizeof(reset));
	*out = reset;
	return send_back(ctx);
}

/* The sum of the quotation, in whole 32-bit words; `*length` is how long it is. */
static __always_inline __u64 sum_quote(const struct packet *p, void *quote, __u32 *length)
{
	__u64 sum = 0;

	*length = 0;
	for (int i = 0; i < MAX_QUOTE / 4; i++) {
		__u32 *word = quote + i * 4;

		if ((void *)(word + 1) > p->end || *length + 4 > p->length)
			break;
		sum = csum_add32(sum, *word);
		*length += 4;
	}
	return sum;
}

/*
 * `rest`: the second word of the ICMP header. Ethernet header and tags stay in place at first; the frame grows in front by an
 * IP and an ICMP header, behind which the packet itself becomes the quotation.
 */
static __always_inline int answer_icmp(struct packet *p, __u8 type, __u8 code, __be32 rest)
{
	const __u32 room = ip_header_length(p) + sizeof(struct icmphdr);
	const __u8 protocol = p->version == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6;
	__be16 ether_type = p->version == 4 ? be16(ETH_P_IP) : be16(ETH_P_IPV6);
	struct icmphdr *icmp;
	struct ethhdr *eth;
	__u32 quote_length;
	__u8 macs[12] __attribute__((aligned(8)));
	void *network;
	__u64 sum;

	sum = sum_quote(p, p->network, &quote_length);
	sum = csum_add32(sum, rest) + be16(type << 8 | code);
	if (p->version == 6)
		sum += pseudo_header(&p->source, &p->destination, protocol, sizeof(*icmp) + quote_length);
	if (!cut(p->ctx, p->link_length, quote_length))
		return verdict(XDP_ABORTED);
	eth = frame_start(p->ctx);
	p->end = frame_end(p->ctx);
	if ((void *)(eth + 1) > p->end)
		return verdict(XDP_ABORTED);
	__builtin_memcpy(macs, eth->macs + 6, 6);
	__builtin_memcpy(macs + 6, eth->macs, 6);
	network = open_front(p, room, ether_type);
	if (!network)
		return verdict(XDP_ABORTED);
	eth = frame_start(p->ctx);
	icmp = network + ip_header_length(p);
	if ((void *)(eth + 1) > p->end || (void *)(icmp + 1) > p->end)
		return verdict(XDP_ABORTED);
	write_reverse_ip(p, network, protocol, sizeof(*icmp) + quote_length);
	set_macs(eth, macs);
	icmp->type = type;
	icmp->code = code;
	icmp->unused = rest & 0xffff;
	icmp->mtu = rest >> 16;
	icmp->check = ~csum_fold(sum);
	return send_back(p->ctx);
}

static __always_inline int answer_unreachable(struct packet *p)
{
	if (p->version == 4)
		return answer_icmp(p, ICMP_UNREACHABLE, ICMP_PORT_UNREACHABLE, 0);
	return answer_icmp(p, ICMPV6_UNREACHABLE, ICMPV6_PORT_UNREACHABLE, 0);
}

/* Over IPv6 never less than any link carries: a host would not heed that (RFC 8201 4). */
static __always_inline int answer_too_big(struct packet *p, __u32 mtu)
{
	if (p->version == 4)
		return answer_icmp(p, ICMP_UNREACHABLE, ICMP_FRAGMENTATION_NEEDED, be32(mtu));
	return answer_icmp(p, ICMPV6_TOO_BIG, 0, be32(mtu < IPV6_MIN_MTU ? IPV6_MIN_MTU : mtu));
}

#endif
