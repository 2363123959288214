/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Fragments: only the first one has ports. It teaches where the others go: to a backend, a client, or the kernel. */
#ifndef XDPLB_FRAGMENT_H
#define XDPLB_FRAGMENT_H

#include "forward.h"
#include "lookup.h"
#include "nat.h"
#include "maps.h"

/* In place of a backend: the datagram is no service's. */
#define TO_KERNEL 0

static __always_inline struct fragment_key fragment_key(const struct packet *p)
{
	struct fragment_key key = {};

	key.source = p->source;
	key.destination = p->destination;
	key.id = p->fragment_id;
	key.protocol = p->version == 4 ? p->protocol : 0; /* later IPv6 fragments may not name it (RFC 8200 4.5) */
	return key;
}

/* Called before the packet is changed. */
static __always_inline void teach_fragments(const struct packet *p, __u32 backend, bool is_reply)
{
	struct fragment_key key;
	struct fragment fragment = { .backend = backend, .reply = is_reply };

	if (p->fragment != FIRST_FRAGMENT)
		return;
	key = fragment_key(p);
	fragments.update(&key, &fragment);
}

/* For a service's address, but for none of its services. */
static __always_inline int pass_to_kernel(const struct packet *p, const bool full)
{
	if (full)
		teach_fragments(p, TO_KERNEL, false);
	return pass();
}

/*
 * Could a later fragment that nothing is known of be a service's? Not if no service of its address has its protocol. TCP is
 * sorted before UDP. Over IPv6, behind an extension header that was cut as well, it may be anything.
 */
static __always_inline bool may_be_for_service(const struct packet *p, struct interval_range claimed)
{
	__u32 index = claimed.first;
	struct interval *interval;

	switch (p->protocol) {
	case IPPROTO_TCP:
		break;
	case IPPROTO_UDP:
		index += claimed.count - 1;
		break;
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_DSTOPTS:
		return p->version == 6;
	default:
		return false;
	}
	interval = intervals.lookup(&index);
	return interval && interval->first >> 16 == p->protocol;
}

/* A later fragment for an address of which services claim some ports, or (`claimed` is empty) from a NAT backend's. */
static __always_inline int later_fragment(struct packet *p, struct interval_range claimed)
{
	struct fragment_key key = fragment_key(p);
	struct fragment *fragment = fragments.lookup(&key);
	const bool for_service = claimed.count;
	struct backend *backend;
	struct service *service;

	if (!fragment)
		return for_service && may_be_for_service(p, claimed) ? drop(0, REASON(fragment_unknown)) : pass();
	if (HAVE_NAT && fragment->reply)
		return reply(p, fragment->backend);
	if (fragment->backend == TO_KERNEL)
		return pass();
	backend = backends.lookup(&fragment->backend);
	service = backend ? services.lookup(&backend->service) : NULL;
	if (!service || !for_service)
		return pass();
	return forward(p, service, backend, fragment->backend, hash_flow(service, &p->source, 0));
}

#endif
