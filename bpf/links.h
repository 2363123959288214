/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the control plane knows of this host's interfaces (xdplb/core/link_facts.py), as a set of words: each stands for an
 * interface and something that holds of it. That is a MAC address to which it takes frames, or a LINK_* below.
 *
 * The MAC addresses of an interface are those under which ip_rcv would take a packet there (xdplb/net/own_macs.py). If they are
 * not known, frames count as this host's, as if nobody had looked. Nearly all of them stand in the directory as well, where one
 * look tells: it is at hand for every packet.
 */
#ifndef XDPLB_LINKS_H
#define XDPLB_LINKS_H

#include "branchless.h"
#include "frame.h"
#include "maps.h"
#include "parse.h"

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

/*
 * Is the frame not for this host alone? A switch floods frames, a capture makes the card take all of them (RFC 1122 3.3.6);
 * what is for many, none of them may forward (RFC 1812 5.3.4). Asked by the first program, where there is something to be done.
 */
static __always_inline bool is_for_others(const struct packet *p)
{
	const struct ethhdr *eth = p->network - sizeof(*eth);
	__u64 mac = *(const __u64 *)eth->macs;
	__u32 ifindex = ingress(p->ctx);
	__u64 word = link_word(ifindex, mac);

	if (p->directory->own_macs[word >> (64 - OWN_MAC_BITS)] == word)
		return false;
	return mac & 1 || (!link_has(ifindex, mac) && link_has(ifindex, LINK_MACS_ARE_KNOWN));
}

#endif
