/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the control plane knows of this host's interfaces (xdplb/core/link_facts.py), as a set of words: each stands for an
 * interface and something that holds of it. That is a MAC address to which it takes frames, or a LINK_* below.
 *
 * The MAC addresses of an interface are those under which ip_rcv would take a packet there (xdplb/net/own_macs.py). If they are
 * not known, frames count as this host's, as if nobody had looked.
 */
#ifndef XDPLB_LINKS_H
#define XDPLB_LINKS_H

#include "branchless.h"
#include "frame.h"
#include "maps.h"

/* No interface owns these: they are for many. */
#define LINK_MACS_ARE_KNOWN 0x01ULL
#define LINK_TAKES_NO_FRAMES 0xffffffffffffULL /* what XDP redirects there is lost, and nobody is told */

/* `what`: a MAC address in its lower 48 bits, as it stands in the frame. The upper bits do not matter. */
static __always_inline __u64 link_word(__u32 ifindex, __u64 what)
{
	return what << 16 ^ ifindex * (__u64)LINK_FACTOR;
}

static __always_inline struct link_facts *find_link_facts(__u64 word)
{
	__u32 index = word >> (64 - LINK_SET_BITS);

	return link_facts.lookup(&index);
}

/* Without branches, each of which the verifier would follow. */
static __always_inline bool link_has(__u32 ifindex, __u64 what)
{
	__u64 word = link_word(ifindex, what);
	struct link_facts *facts = find_link_facts(word);
	__u64 found = 0;

	if (!facts)
		return false; /* cannot be */
#pragma unroll
	for (int i = 0; i < 8; i++)
		found |= is_zero(facts->word[i] ^ word);
	return found;
}

/* Is it the first of its set? Nearly all are. */
static __always_inline bool link_has_first(__u32 ifindex, __u64 what)
{
	__u64 word = link_word(ifindex, what);
	struct link_facts *facts = find_link_facts(word);

	return facts && facts->word[0] == word;
}

/*
 * Is the frame another host's? A switch floods frames, a capture makes the card take all of them (RFC 1122 3.3.6). Asked where
 * there is something to be done, and few values are alive: earlier it costs twice as much.
 */
static __always_inline bool is_for_another_host(struct xdp_md *ctx)
{
	const struct ethhdr *eth = frame_start(ctx);
	__u32 ifindex = ingress(ctx);
	__u64 mac;

	if ((void *)(eth + 1) > frame_end(ctx))
		return false;
	mac = *(const __u64 *)eth->macs;
	if (link_has_first(ifindex, mac))
		return false;
	return !link_has(ifindex, mac) && link_has(ifindex, LINK_MACS_ARE_KNOWN);
}

#endif
