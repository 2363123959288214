/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Changes in place: link layer, hop count, and the addresses and ports of NAT. All checksums incrementally. */
#ifndef XDPLB_REWRITE_H
#define XDPLB_REWRITE_H

#include "csum.h"
#include "parse.h"

static __always_inline void set_macs(struct ethhdr *eth, const __u8 *macs)
{
	*(__u64 *)eth->macs = *(const __u64 *)macs;
	*(__u32 *)(eth->macs + 8) = *(const __u32 *)(macs + 8);
}

static __always_inline void swap_macs(struct ethhdr *eth)
{
	__u16 *word = (__u16 *)eth->macs;

#pragma unroll
	for (int i = 0; i < 3; i++) {
		__u16 destination = word[i];

		word[i] = word[i + 3];
		word[i + 3] = destination;
	}
}

/* Would a router have to send this one back? */
static __always_inline bool hops_used_up(const struct packet *p)
{
	return (p->version == 4 ? p->ip4->ttl : p->ip6->hop_limit) <= 1;
}

static __always_inline void take_hop(struct packet *p)
{
	__u32 check;

	if (p->version == 6) {
		p->ip6->hop_limit--;
		return;
	}
	/* The TTL is the first byte of its word: one less of it is be16(0x0100) more of the checksum, with the carry (RFC
	 * 1141). */
	check = p->ip4->check + be16(0x0100);
	p->ip4->check = check + (check >= 0xffff);
	p->ip4->ttl--;
}

/* What `take_hop` took. */
static __always_inline void give_hop(struct packet *p)
{
	__u32 check;

	if (p->version == 6) {
		p->ip6->hop_limit++;
		return;
	}
	check = p->ip4->check + 0xffff - be16(0x0100);
	p->ip4->check = check + (check >> 16);
	p->ip4->ttl++;
}

/*
 * The transport's checksum after changes that `sum` gathered. A later fragment has none: its first one was changed. UDP may go
 * without, over IPv6 too (RFC 6935).
 */
static __always_inline void patch_transport(struct packet *p, __u64 sum)
{
	struct tcphdr *tcp = p->transport;
	struct udphdr *udp = p->transport;

	if (p->protocol == IPPROTO_TCP) {
		if ((void *)(tcp + 1) <= p->end)
			tcp->check = csum_apply(tcp->check, sum);
	} else if (p->protocol == IPPROTO_UDP) {
		if ((void *)(udp + 1) <= p->end && udp->check)
			udp->check = csum_apply_udp(udp->check, sum);
	}
}

/* Changes the IP header's destination (or source); returns what the transport's checksum must learn of it. */
static __always_inline __u64 replace_address(struct packet *p, const struct address *new, const bool is_source)
{
	const struct address *old = is_source ? &p->source : &p->destination;
	struct ipv6hdr *ip6 = p->network;
	__u64 sum = 0;

	if (p->version == 4) {
		sum = csum_change32(0, unmapped(old), unmapped(new));
		p->ip4->check = csum_apply(p->ip4->check, sum);
		if (is_source)
			p->ip4->source = unmapped(new);
		else
			p->ip4->destination = unmapped(new);
		return sum;
	}
	asm volatile("" : "+r"(ip6));
	if ((void *)(ip6 + 1) > p->end)
		return 0; /* cannot be; the verifier may have lost sight of the version */
	if (is_source) {
		ip6->source[0] = new->hi;
		ip6->source[1] = new->lo;
	} else {
		ip6->destination[0] = new->hi;
		ip6->destination[1] = new->lo;
	}
	return csum_change_address(0, old, new);
}

/* NAT of a whole packet or a fragment: one side's address, and its port where `port` is not 0. */
static __always_inline void translate(struct packet *p, const struct address *new, __be16 port, const bool is_source)
{
	__u64 sum = replace_address(p, new, is_source);
	__be16 *ports = p->transport;

	if (p->fragment == LATER_FRAGMENT)
		return;
	if ((void *)(ports + 2) > p->end)
		return; /* cannot be: the ports were read from there */
	if (port) {
		sum = csum_change16(sum, ports[!is_source], port);
		ports[!is_source] = port;
	}
	patch_transport(p, sum);
}

#endif
