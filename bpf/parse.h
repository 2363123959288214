/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * From the frame to a `struct packet`. Network and transport layer are parsed apart, because most traffic of a gateway is
 * nobody's service and leaves after the address was looked at.
 *
 * `full` is a constant: false parses only what nearly all packets are (no VLAN tags, IPv4 options, IPv6 extension headers or
 * fragments) and says PARSE_FULL for the rest, true parses all of it.
 */
#ifndef XDPLB_PARSE_H
#define XDPLB_PARSE_H

#include "branchless.h"
#include "frame.h"
#include "maps.h"

enum parsed {
	PARSED,
	PARSE_OTHER,     /* nothing that could belong to a service */
	PARSE_FULL,      /* for the program that parses everything */
	PARSE_MALFORMED, /* headers truncated, or lengths that contradict the frame */
};

enum fragment_kind { WHOLE, FIRST_FRAGMENT, LATER_FRAGMENT };

struct packet {
	struct xdp_md *ctx;
	const struct directory *directory; /* never NULL once the packet is parsed */
	void *end;
	union {
		struct ipv4hdr *ip4;
		struct ipv6hdr *ip6;
		void *network;
	};
	void *transport; /* not to be touched where fragment is LATER_FRAGMENT */
	struct address source;
	struct address destination;
	__u32 link_length;      /* of Ethernet header and tags */
	__u32 length;           /* of the IP packet, as it says itself */
	__u32 transport_length; /* what of that comes after the network headers */
	__u32 ports;            /* source and destination, as they stand in the frame */
	__u32 fragment_id;
	__u32 version;
	__u32 protocol;
	__u32 tcp_flags;
	__u32 fragment; /* enum fragment_kind */
};

/* Room for VLAN and QinQ. */
#define MAX_TAGS 2
#define MAX_EXTENSIONS 6
#define MAX_TRANSPORT_OFFSET 16383 /* in a frame: MAX_EXTENSIONS of the longest do not fit any MTU */

static __always_inline __be16 source_port(const struct packet *p)
{
	return p->ports & 0xffff;
}

static __always_inline __be16 destination_port(const struct packet *p)
{
	return p->ports >> 16;
}

static __always_inline struct address mapped(__be32 ipv4)
{
	return (struct address){ .hi = 0, .lo = (__u64)ipv4 << 32 | 0xffff0000 };
}

static __always_inline bool is_mapped(const struct address *address)
{
	return address->hi == 0 && (__u32)address->lo == 0xffff0000;
}

static __always_inline __be32 unmapped(const struct address *address)
{
	return address->lo >> 32;
}

/* A length to compute pointers with. To the verifiers of Linux 6.1 and 6.12 a number whose bytes were swapped has no bounds. */
static __always_inline __u32 wire_length(__be16 field)
{
	__u32 length = be16(field);

	asm volatile("" : "+r"(length));
	return length & 0xffff;
}

/* Does the frame end before `length` bytes after `start`? */
static __always_inline bool ends_before(const struct packet *p, void *start, __u32 length)
{
	return start + length > p->end;
}

static __always_inline enum parsed parse_ipv4(struct packet *p, const bool full)
{
	struct ipv4hdr *ip = p->network;
	__u32 header_length = sizeof(*ip);

	if ((void *)(ip + 1) > p->end)
		return PARSE_OTHER; /* no destination to blame it on */
	p->version = 4;
	p->source = mapped(ip->source);
	p->destination = mapped(ip->destination);
	p->protocol = ip->protocol;
	p->length = wire_length(ip->length);
	p->transport = ip + 1;
	if (!full && (ip->version_ihl != 0x45 || ip->fragment & be16(IP_MF | IP_OFFSET)))
		return PARSE_FULL;
	if (full) {
		header_length = (ip->version_ihl & 0x0f) * 4;
		if (ip->version_ihl >> 4 != 4 || header_length < sizeof(*ip))
			return PARSE_MALFORMED;
		p->transport = p->network + header_length;
		p->fragment_id = ip->id;
		p->fragment = ip->fragment & be16(IP_OFFSET) ? LATER_FRAGMENT
			      : ip->fragment & be16(IP_MF)   ? FIRST_FRAGMENT
							     : WHOLE;
	}
	if (p->length < header_length || ends_before(p, p->network, p->length))
		return PARSE_MALFORMED;
	p->transport_length = p->length - header_length;
	return PARSED;
}

/* An extension header's length; `cut` is 1 for a fragment header, which has no field for that. With a bound to see. */
static __always_inline __u32 extension_length(const struct ipv6_extension *extension, __u64 cut)
{
	__u64 more = extension->length * 8 * (1 - cut);

	asm volatile("" : "+r"(more));
	return sizeof(*extension) + (more & 255 * 8);
}

/*
 * Steps over one extension header; PARSE_OTHER where the transport header is reached. No branch tells the fragment header from
 * others, or the verifier would follow all orders that they can come in.
 */
static __always_inline enum parsed parse_extension(struct packet *p)
{
	struct ipv6_extension *extension = p->transport;
	struct ipv6_fragment *fragment = p->transport;
	__u64 cut, first, later;
	__u32 length;

	switch (p->protocol) {
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_DSTOPTS:
	case IPPROTO_FRAGMENT:
		break;
	default:
		return PARSE_OTHER;
	}
	if ((void *)(extension + 1) > p->end)
		return PARSE_MALFORMED;
	cut = is_zero(p->protocol ^ IPPROTO_FRAGMENT);
	later = cut & ~is_zero(fragment->offset & be16(IP6_OFFSET));
	first = cut & ~is_zero(fragment->offset & be16(IP6_MF));
	p->fragment = either(later, LATER_FRAGMENT, p->fragment | first * FIRST_FRAGMENT);
	p->fragment_id = either(cut, fragment->id, p->fragment_id);
	length = extension_length(extension, cut);
	if (length > p->transport_length)
		return PARSE_MALFORMED;
	p->protocol = extension->next_header;
	p->transport_length -= length;
	p->transport += length;
	return PARSED;
}

static __always_inline enum parsed parse_ipv6(struct packet *p, const bool full)
{
	struct ipv6hdr *ip = p->network;
	enum parsed parsed;

	if ((void *)(ip + 1) > p->end)
		return PARSE_OTHER;
	p->version = 6;
	p->source = (struct address){ .hi = ip->source[0], .lo = ip->source[1] };
	p->destination = (struct address){ .hi = ip->destination[0], .lo = ip->destination[1] };
	p->protocol = ip->next_header;
	p->transport_length = wire_length(ip->payload_length);
	p->length = sizeof(*ip) + p->transport_length;
	p->transport = ip + 1;
	if (is_mapped(&p->source) || is_mapped(&p->destination))
		return PARSE_OTHER; /* would be taken for IPv4's; has no business on the wire (RFC 4038 4.2) */
	if (*(__u8 *)ip >> 4 != 6 || ends_before(p, p->network, p->length))
		return PARSE_MALFORMED;
	if (!full)
		return PARSED;
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		parsed = parse_extension(p);
		if (parsed == PARSE_MALFORMED)
			return PARSE_MALFORMED;
		if (parsed == PARSE_OTHER || p->fragment == LATER_FRAGMENT)
			return PARSED;
	}
	return PARSED; /* more headers than any host sends: the transport will be unknown */
}

/*
 * Forgets how the headers were found. Otherwise the verifier follows every combination of tags, options and extension headers
 * to the end of the program, each apart, and gives up. By way of memory all become plain bounded numbers.
 */
static __always_inline enum parsed forget_path(struct packet *p, enum parsed parsed)
{
	void *start = frame_start(p->ctx);
	__u32 zero = 0;
	struct found *found = founds.lookup(&zero), now;

	if (!found)
		return PARSE_OTHER;
	*found = (struct found){
		.parsed = parsed,
		.link_length = p->link_length,
		.transport_offset = p->transport - start,
		.length = p->length,
		.transport_length = p->transport_length,
		.fragment_id = p->fragment_id,
		.version = p->version,
		.protocol = p->protocol,
		.fragment = p->fragment,
	};
	asm volatile("" : : : "memory");
	now = *found;
	if (now.link_length > sizeof(struct ethhdr) + MAX_TAGS * sizeof(struct vlan_tag))
		return PARSE_OTHER;
	p->link_length = now.link_length;
	p->network = start + now.link_length;
	p->length = now.length;
	p->transport_length = now.transport_length;
	p->fragment_id = now.fragment_id;
	p->version = now.version;
	p->protocol = now.protocol;
	p->fragment = now.fragment;
	if (now.parsed != PARSED || now.transport_offset > MAX_TRANSPORT_OFFSET)
		return PARSE_MALFORMED;
	p->transport = start + now.transport_offset;
	if (p->network + (p->version == 4 ? sizeof(struct ipv4hdr) : sizeof(struct ipv6hdr)) > p->end)
		return PARSE_MALFORMED;
	return PARSED;
}

static __always_inline bool is_tag(__be16 type)
{
	return type == be16(ETH_P_8021Q) || type == be16(ETH_P_8021AD);
}

/* Link and network layer: addresses, protocol, lengths. */
static __always_inline enum parsed parse_headers(struct packet *p, struct xdp_md *ctx, const bool full)
{
	struct ethhdr *eth = frame_start(ctx);
	__u32 zero = 0;
	__be16 type;

	p->ctx = ctx;
	p->end = frame_end(ctx);
	p->directory = directory.lookup(&zero);
	if (!p->directory || (void *)(eth + 1) > p->end)
		return PARSE_OTHER;
	p->network = eth + 1;
	p->link_length = sizeof(*eth);
	type = eth->type;
	if (full) {
#pragma unroll
		for (int i = 0; i < MAX_TAGS; i++) {
			struct vlan_tag *tag = p->network;

			if (!is_tag(type))
				break;
			if ((void *)(tag + 1) > p->end)
				return PARSE_OTHER;
			p->network += sizeof(*tag);
			p->link_length += sizeof(*tag);
			type = tag->type;
		}
	}
	if (HAVE_IPV4 && type == be16(ETH_P_IP))
		return parse_ipv4(p, full);
	if (HAVE_IPV6 && type == be16(ETH_P_IPV6))
		return parse_ipv6(p, full);
	return !full && is_tag(type) ? PARSE_FULL : PARSE_OTHER;
}

static __always_inline enum parsed parse_network(struct packet *p, struct xdp_md *ctx, const bool full)
{
	enum parsed parsed = parse_headers(p, ctx, full);

	return full && parsed != PARSE_OTHER ? forget_path(p, parsed) : parsed;
}

static __always_inline enum parsed parse_tcp(struct packet *p)
{
	struct tcphdr *tcp = p->transport;
	__u32 header_length;

	if ((void *)(tcp + 1) > p->end)
		return PARSE_MALFORMED;
	header_length = (tcp->data_offset >> 4) * 4;
	if (header_length < sizeof(*tcp) || header_length > p->transport_length)
		return PARSE_MALFORMED;
	p->ports = *(__u32 *)tcp;
	p->tcp_flags = tcp->flags;
	return PARSED;
}

static __always_inline enum parsed parse_udp(struct packet *p)
{
	struct udphdr *udp = p->transport;
	__u32 length;

	if ((void *)(udp + 1) > p->end || p->transport_length < sizeof(*udp))
		return PARSE_MALFORMED;
	length = be16(udp->length);
	if (length < sizeof(*udp) || (length > p->transport_length && p->fragment == WHOLE))
		return PARSE_MALFORMED;
	p->ports = *(__u32 *)udp;
	return PARSED;
}

/* Ports and flags of TCP and UDP. Later fragments have none. */
static __always_inline enum parsed parse_transport(struct packet *p, const bool full)
{
	if (full && p->fragment == LATER_FRAGMENT)
		return PARSED;
	if (p->protocol == IPPROTO_TCP)
		return parse_tcp(p);
	if (p->protocol == IPPROTO_UDP)
		return parse_udp(p);
	return full ? PARSE_OTHER : PARSE_FULL;
}

/* ICMP messages that are about another packet; everything else of ICMP is the kernel's. */
static __always_inline bool is_icmp(const struct packet *p)
{
	return p->protocol == (p->version == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6);
}

#endif
