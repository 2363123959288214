/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the way of encapsulated packets carries (RFC 2003 5.1, RFC 2473 7.1). A router that finds one too big reports to its
 * outer source, which is this host, and not to the client. The report is noted with the tunnel. The control plane then lowers
 * the MTU of its backends (xdplb/daemon/tunnel_mtus.py), so that the next packet that does not fit is answered "too big".
 */
#ifndef XDPLB_TUNNEL_MTU_H
#define XDPLB_TUNNEL_MTU_H

#include "answer.h"
#include "flow.h"
#include "icmp.h"

#define LEAST_MTU_IPV4 552 /* Linux' net.ipv4.route.min_pmtu */

/* Is it "fragmentation needed" or "packet too big"? `mtu` is what it reports. */
static __always_inline bool reports_too_big(const struct packet *p, __u32 *mtu)
{
	struct icmphdr *icmp = p->transport;

	if (!is_icmp(p) || p->fragment != WHOLE || (void *)(icmp + 1) > p->end)
		return false;
	*mtu = be16(icmp->mtu);
	if (p->version == 4) {
		if (*mtu < LEAST_MTU_IPV4)
			*mtu = LEAST_MTU_IPV4; /* 0 too: from a router older than RFC 1191 */
		return icmp->type == ICMP_UNREACHABLE && icmp->code == ICMP_FRAGMENTATION_NEEDED;
	}
	if (icmp->unused)
		*mtu = 0xffff;
	if (*mtu < IPV6_MIN_MTU)
		*mtu = IPV6_MIN_MTU;
	return icmp->type == ICMPV6_TOO_BIG;
}

/* The tunnel whose packet is quoted; NULL where it is not from here (RFC 5927 4.1). */
static __always_inline struct tunnel_way *find_quoted_tunnel(const struct packet *p, struct quoted *q)
{
	struct tunnel_way *tunnel;
	__u64 spread;

	if (!parse_quoted_network(p, q) || !same_address(&q->source, &p->destination))
		return NULL;
	if (q->protocol != IPPROTO_IPIP && q->protocol != IPPROTO_IPV6 && q->protocol != IPPROTO_UDP)
		return NULL;
	tunnel = tunnels.lookup(&q->destination);
	if (!tunnel)
		return NULL;
	spread = (__u64)tunnel->source_spread << 32;
	if (q->source.hi != tunnel->source.hi || (q->source.lo ^ tunnel->source.lo) & ~spread)
		return NULL;
	return tunnel;
}

/* Of several routers the smallest counts, until it was reported for the last time TUNNEL_MTU_TICKS ago. */
static __always_inline void note_tunnel_mtu(struct tunnel_way *tunnel, const struct address *address, __u32 mtu)
{
	__u32 zero = 0, now = current_tick();
	struct tunnel_news *news = tunnel_news.lookup(&zero);

	if (!news || (tunnel->mtu && now - tunnel->tick < TUNNEL_MTU_TICKS && mtu > tunnel->mtu))
		return;
	tunnel->mtu = mtu;
	tunnel->tick = now;
	news->latest[news->count % TUNNEL_NEWS] = *address;
	news->count++;
}

/* The kernel gets the report as well: what this host itself sends to the backend may be too big, too. */
static __always_inline int tunnel_error(struct packet *p)
{
	struct quoted quoted = {};
	struct tunnel_way *tunnel;
	__u32 mtu;

	if (!reports_too_big(p, &mtu))
		return pass();
	tunnel = find_quoted_tunnel(p, &quoted);
	if (tunnel)
		note_tunnel_mtu(tunnel, &quoted.destination, mtu);
	return pass();
}

#endif
