/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The scheduler. A service's flows are hashed onto its slots; each slot names a backend. The control plane builds the
 * table (weighted Maglev, NSDI 2016, with exact quotas), so that weights cost nothing here.
 *
 * A slot is one word: the backend's id, and the top bits reserved for what a slot in transition needs beside it.
 */
#ifndef XDPLB_SLOTS_H
#define XDPLB_SLOTS_H

#include "hash.h"
#include "maps.h"

#define SLOT_BACKEND 0x00ffffff

/*
 * The backend for a flow. One that is down loses its flows at once, before its slots are given away: they are hashed again
 * until a slot's backend is up. The more backends are up, the fewer tries; all in vain is as good as nobody there.
 */
static __always_inline struct backend *schedule(const struct service *service, __u64 hash, __u32 *id)
{
	__u32 zero = 0, index;
	struct slot_table *table = slots.lookup(&zero);
	struct backend *backend;

	if (!table)
		return NULL;
	for (int i = 0; i < RESCHEDULE_TRIES; i++) {
		index = (service->slots + ((__u32)hash & service->slot_mask)) & (SLOTS - 1);
		*id = ((__u32 *)table)[index] & SLOT_BACKEND;
		backend = backends.lookup(id);
		if (backend && backend->flags & BACKEND_UP)
			return backend;
		hash = mix(hash, i + 1);
	}
	return NULL;
}

#endif
