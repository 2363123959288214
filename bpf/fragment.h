/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Fragments: only the first one has ports. It teaches where the others go. */
#ifndef XDPLB_FRAGMENT_H
#define XDPLB_FRAGMENT_H

#include "forward.h"
#include "nat.h"
#include "maps.h"

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

/* A later fragment for a service's address, or from a NAT backend's. `service` is whether it was for a service. */
static __always_inline int later_fragment(struct packet *p, bool for_service)
{
	struct fragment_key key = fragment_key(p);
	struct fragment *fragment = fragments.lookup(&key);
	struct backend *backend;
	struct service *service;

	if (!fragment)
		return for_service ? drop(0, REASON(fragment_unknown)) : pass();
	if (HAVE_NAT && fragment->reply)
		return reply(p, fragment->backend);
	backend = backends.lookup(&fragment->backend);
	service = backend ? services.lookup(&backend->service) : NULL;
	if (!service || !for_service)
		return pass();
	return forward(p, service, backend, fragment->backend, hash_flow(service, &p->source, 0));
}

#endif
