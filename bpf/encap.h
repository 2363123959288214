/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Encapsulation: IP in IP (RFC 2003, 2473, 4213) and GUE variant 1, which is UDP with an IP packet for payload.
 * The outer source address takes bits of the flow hash where the operator gave a prefix to draw it from, GUE's source port
 * always does: that is what spreads flows over a backend's receive queues.
 */
#ifndef XDPLB_ENCAP_H
#define XDPLB_ENCAP_H

#include "csum.h"
#include "parse.h"
#include "rewrite.h"

#define OUTER_TTL 64
#define GUE_FIRST_SOURCE_PORT 0xc000 /* the dynamic ports, RFC 6335 */

struct outer {
	const struct service *service;
	const struct backend *backend;
	__u32 hash;
	__u32 inner_length;
	__u8 inner_version;
	__u8 traffic_class; /* DSCP and ECN are those of the inner packet (RFC 2983 uniform, RFC 6040 normal) */
	__u8 protocol;
	__u8 pad;
};

static __always_inline __u32 outer_length(const struct service *service, const struct backend *backend)
{
	__u32 length = OUTER_IPV6 && backend->flags & BACKEND_IPV6 ? sizeof(struct ipv6hdr) : sizeof(struct ipv4hdr);

	if (HAVE_GUE && service->forward == FORWARD_GUE)
		length += sizeof(struct udphdr);
	return length;
}

static __always_inline void write_outer_ipv4(struct ipv4hdr *ip, const struct outer *outer, __u32 length)
{
	__be32 source = unmapped(&outer->backend->source) | (outer->backend->source_spread & outer->hash);
	__be32 destination = unmapped(&outer->backend->address);
	__u32 *words = (__u32 *)ip;
	__u64 sum;

	words[0] = be16(0x4500 | outer->traffic_class) | (__u32)be16(length) << 16;
	words[1] = (__u32)be16(IP_DF) << 16; /* id 0, never fragmented: atomic, RFC 6864 */
	ip->ttl = OUTER_TTL;
	ip->protocol = outer->protocol;
	ip->source = source;
	ip->destination = destination;
	sum = csum_add32(be16(IP_DF) + be16(OUTER_TTL << 8 | outer->protocol), words[0]);
	ip->check = ~csum_fold(csum_add32(csum_add32(sum, source), destination));
}

static __always_inline void write_outer_ipv6(struct ipv6hdr *ip, const struct outer *outer, __u32 length)
{
	const struct backend *backend = outer->backend;

	ip->version_class_label = be32(0x60000000 | (__u32)outer->traffic_class << 20 | (outer->hash & 0xfffff));
	ip->payload_length = be16(length - sizeof(*ip));
	ip->next_header = outer->protocol;
	ip->hop_limit = OUTER_TTL;
	ip->source[0] = backend->source.hi;
	ip->source[1] = backend->source.lo | (__u64)(backend->source_spread & outer->hash) << 32;
	ip->destination[0] = backend->address.hi;
	ip->destination[1] = backend->address.lo;
}

/* A checksum of 0, as RFC 6935 allows over IPv6 too: the inner packet has its own. */
static __always_inline void write_outer_udp(struct udphdr *udp, const struct outer *outer)
{
	udp->source = be16(GUE_FIRST_SOURCE_PORT | (outer->hash >> 16 & 0x3fff));
	udp->destination = outer->service->gue_port;
	udp->length = be16(sizeof(*udp) + outer->inner_length);
	udp->check = 0;
}

/*
 * Makes room for `room` bytes in front, moves Ethernet header and tags there. Returns where the outer header goes, NULL if
 * there was no headroom. All pointers into the packet are stale afterwards.
 */
static __always_inline void *open_front(struct packet *p, const __u32 room, const __be16 type)
{
	struct xdp_md *ctx = p->ctx;
	__u32 link_length = p->link_length;
	struct vlan_tag tags[MAX_TAGS] = {};
	struct vlan_tag *tag;
	struct ethhdr *eth;

	if (link_length > sizeof(*eth)) {
		tag = frame_start(ctx) + sizeof(*eth);
		if ((void *)(tag + MAX_TAGS) > p->end)
			return NULL;
		__builtin_memcpy(tags, tag, sizeof(tags));
	}
	if (bpf_xdp_adjust_head(ctx, -(int)room))
		return NULL;
	eth = frame_start(ctx);
	p->end = frame_end(ctx);
	tag = (void *)(eth + 1);
	if ((void *)(tag + MAX_TAGS) > p->end)
		return NULL;
	if (link_length == sizeof(*eth)) {
		eth->type = type;
	} else {
		/* The type of the first tag stands where it stood; each tag carries the type of what follows. */
		__be16 first = 0;

		if ((void *)eth + room + sizeof(*eth) > p->end)
			return NULL;
		first = ((struct ethhdr *)((void *)eth + room))->type;
		eth->type = first;
		tag[0] = tags[0];
		if (link_length == sizeof(*eth) + sizeof(*tag)) {
			tag[0].type = type;
		} else {
			tag[1].tci = tags[1].tci;
			tag[1].type = type;
		}
	}
	return (void *)eth + link_length;
}

static __always_inline bool encapsulate_ipv4(struct packet *p, struct outer *outer, const bool gue)
{
	const __u32 room = sizeof(struct ipv4hdr) + (gue ? sizeof(struct udphdr) : 0);
	struct ipv4hdr *ip = open_front(p, room, be16(ETH_P_IP));

	if (!ip || (void *)ip + room > p->end)
		return false;
	outer->protocol = gue ? IPPROTO_UDP : outer->inner_version == 4 ? IPPROTO_IPIP : IPPROTO_IPV6;
	write_outer_ipv4(ip, outer, outer->inner_length + room);
	if (gue)
		write_outer_udp((void *)(ip + 1), outer);
	return true;
}

static __always_inline bool encapsulate_ipv6(struct packet *p, struct outer *outer, const bool gue)
{
	const __u32 room = sizeof(struct ipv6hdr) + (gue ? sizeof(struct udphdr) : 0);
	struct ipv6hdr *ip = open_front(p, room, be16(ETH_P_IPV6));

	if (!ip || (void *)ip + room > p->end)
		return false;
	outer->protocol = gue ? IPPROTO_UDP : outer->inner_version == 4 ? IPPROTO_IPIP : IPPROTO_IPV6;
	write_outer_ipv6(ip, outer, outer->inner_length + room);
	if (gue)
		write_outer_udp((void *)(ip + 1), outer);
	return true;
}

static __always_inline __u8 traffic_class(const struct packet *p)
{
	return p->version == 4 ? p->ip4->tos : be32(p->ip6->version_class_label) >> 20;
}

/* Wraps the packet for `backend`. False where the frame has no headroom; it is unusable then. */
static __always_inline bool encapsulate(struct packet *p, const struct service *service, const struct backend *backend,
					__u32 hash)
{
	struct outer outer = {
		.service = service,
		.backend = backend,
		.hash = hash,
		.inner_length = p->length,
		.inner_version = p->version,
		.traffic_class = traffic_class(p),
	};
	const bool ipv6 = OUTER_IPV6 && (!OUTER_IPV4 || backend->flags & BACKEND_IPV6);
	const bool gue = HAVE_GUE && (!HAVE_IPIP || service->forward == FORWARD_GUE);

	if (ipv6)
		return gue ? encapsulate_ipv6(p, &outer, true) : HAVE_IPIP && encapsulate_ipv6(p, &outer, false);
	if (gue)
		return encapsulate_ipv4(p, &outer, true);
	return HAVE_IPIP && encapsulate_ipv4(p, &outer, false);
}

#endif
