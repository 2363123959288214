/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The slot table. A service's flows are hashed onto its slots; each slot names a backend. The control plane builds the table
 * (weighted Maglev, NSDI 2016, with exact quotas), so that weights cost nothing here.
 *
 * A slot is one word: the backend's id, and SLOT_IN_TRANSITION where the slot changed hands and flows of the time before may
 * live on. What is settled needs nothing else.
 */
#ifndef XDPLB_SLOTS_H
#define XDPLB_SLOTS_H

#include "hash.h"
#include "maps.h"

/* `slots` and `slot_mask` are read as the one word that they are written as: so no packet mixes two tables of a service. */
static __always_inline __u32 slot_index(const struct service *service, __u64 hash)
{
	__u64 table = *(const volatile __u64 *)&service->slots;

	return ((__u32)table + ((__u32)hash & table >> 32)) & (SLOTS - 1);
}

static __always_inline __u32 read_slot(__u32 index)
{
	__u32 line = index / 16;
	struct slot_block *block = slots.lookup(&line);

	return block ? block->slot[index % 16] : 0;
}

static __always_inline struct transition read_transition(__u32 index)
{
	struct transition *transition = transitions.lookup(&index);

	return transition ? *transition : (struct transition){};
}

static __always_inline struct backend *find_backend(__u32 slot, __u32 *id)
{
	*id = slot & SLOT_BACKEND;
	return backends.lookup(id);
}

/*
 * The backend for a new flow whose scheduler is a hash. One that is down loses its flows at once, before its slots are given
 * away: they are hashed again until a slot's backend is up. The more backends are up, the fewer tries; all in vain is as good
 * as nobody there.
 */
static __always_inline struct backend *backend_by_hash(const struct service *service, __u64 hash, __u32 *id)
{
	struct backend *backend;

	for (int i = 0; i < RESCHEDULE_TRIES; i++) {
		backend = find_backend(read_slot(slot_index(service, hash)), id);
		if (backend && backend->flags & BACKEND_UP)
			return backend;
		hash = mix(hash, i + 1);
	}
	return NULL;
}

#endif
