/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What time does to remembered flows. The control plane has `xdplb_sweep` go through the cache, by test runs; it stands here
 * because only a program can change a word and the backend's count as one.
 */
#ifndef XDPLB_SWEEP_H
#define XDPLB_SWEEP_H

#include "flow.h"
#include "maps.h"
#include "slots.h"

/* Is the slot of a remembered flow in transition? */
static __always_inline bool is_kept(const struct service *service, __u64 word)
{
	return read_slot(slot_index(service, FLOW_FINGERPRINT(word))) & SLOT_IN_TRANSITION;
}

/*
 * What is to stand in the place of a word. An ended flow of a settled slot goes: later ones of the same ports leave no trace
 * there, and would be taken for it at the next change. One that keeps its slot in transition stays, in case it wakes up,
 * but does not count.
 */
static __always_inline __u64 aged(__u64 word, __u32 tick)
{
	__u32 id = FLOW_BACKEND(word), idle = idle_ticks(word, tick), limit;
	struct backend *backend = backends.lookup(&id);
	struct service *service = NULL;

	if (idle > FLOW_WRAPPING)
		return 0;
	if (backend && backend->service)
		service = services.lookup(&backend->service);
	limit = TIMEOUTS >> 12 * FLOW_STATE(word) & 0xfff;
	if (service && service->keep_idle > limit)
		limit = service->keep_idle;
	if (idle <= limit)
		return word;
	return service && is_kept(service, word) ? word & ~FLOW_COUNTED : 0;
}

/* One set, the next each time. */
static __always_inline void sweep_set(void)
{
	__u32 zero = 0, *position = sweep_position.lookup(&zero), tick = current_tick(), index;
	struct flow_set *set;
	__u64 word, fresh;

	if (!position)
		return;
	index = (*position)++ % (FLOW_SETS + SNAT_SETS);
	set = index < FLOW_SETS ? flow_sets.lookup(&index) : NULL;
	if (HAVE_FULL_NAT && !set) {
		index -= FLOW_SETS;
		set = snat_sets.lookup(&index);
	}
	if (!set)
		return;
	for (int i = 0; i < WAYS; i++) {
		word = set->flow[i];
		fresh = word ? aged(word, tick) : 0;
		if (fresh != word)
			replace_flow(&set->flow[i], word, fresh);
	}
}

#endif
