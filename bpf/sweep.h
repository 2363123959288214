/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What time and the removal of a backend do to remembered flows. The control plane has `xdplb_sweep` go through the cache, and
 * `xdplb_forget` look at the words that it names, by test runs. Both stand here because only a program can change a word that
 * packets change as well, and the backend's count with it.
 */
#ifndef XDPLB_SWEEP_H
#define XDPLB_SWEEP_H

#include "flow.h"
#include "maps.h"
#include "nat_flows.h"
#include "slots.h"

/* Is the slot of a remembered flow in transition? */
static __always_inline bool is_kept(const struct service *service, __u64 word)
{
	return read_slot(slot_index(service, FLOW_FINGERPRINT(word))) & SLOT_IN_TRANSITION;
}

/*
 * What is to stand in the place of a word. An ended flow of a settled slot goes: later ones of the same ports leave no trace
 * there, and would be taken for it at the next change. One that keeps its slot in transition stays, in case it wakes up,
 * but does not count. A mapping (snat.h) keeps no slot.
 */
static __always_inline __u64 aged(__u64 word, __u32 tick, bool mapping)
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
	return service && !mapping && is_kept(service, word) ? word & ~FLOW_COUNTED : 0;
}

/* The word of a flow whose backend was removed, where the client is to be told. It counts for none. */
static __always_inline __u64 orphaned(__u64 word)
{
	return (word & ~(FLOW_COUNTED | 0x1ffffULL << 14)) | (__u64)BACKEND_GONE << 14;
}

/*
 * Is the set of this number one of SNAT mappings, or behind those one of flows at NAT backends? They stand behind the flow
 * cache's, and count for no backend.
 */
static __always_inline bool holds_mappings(__u32 index)
{
	return index >= FLOW_SETS;
}

static __always_inline struct flow_set *any_set(__u32 index)
{
	struct flow_set *set = flow_sets.lookup(&index);

	index -= FLOW_SETS;
	if (!set)
		set = snat_sets.lookup(&index);
	index -= SNAT_SETS;
	return set || !HAVE_NAT ? set : nat_sets.lookup(&index);
}

static __always_inline void replace_any(__u64 *place, __u64 old, __u64 new, bool mapping)
{
	if (mapping)
		replace_word(place, old, new);
	else
		replace_flow(place, old, new);
}

/* What was silent for long is left where it is, as silent for long: a backend's own connection may be so for hours. */
static __always_inline void sweep_nat_set(__u32 index, __u32 tick)
{
	struct flow_set *set = nat_sets.lookup(&index);
	__u64 word;

	if (!set)
		return;
	for (int i = 0; i < WAYS; i++) {
		word = set->flow[i];
		if (word && idle_ticks(word, tick) > FLOW_WRAPPING)
			put_nat_flow(&set->flow[i], word, NAT_OWNER(word), tick - FLOW_WRAPPING, FLOW_STATE(word));
	}
}

/* One set, the next each time. */
static __always_inline void sweep_set(void)
{
	__u32 zero = 0, *position = sweep_position.lookup(&zero), tick = current_tick(), index;
	struct flow_set *set;
	__u64 word, fresh;

	if (!position)
		return;
	index = (*position)++ % (FLOW_SETS + SNAT_SETS + NAT_SETS);
	if (HAVE_NAT && index >= FLOW_SETS + SNAT_SETS) {
		sweep_nat_set(index - (FLOW_SETS + SNAT_SETS), tick);
		return;
	}
	set = any_set(index);
	if (!set)
		return;
	for (int i = 0; i < WAYS; i++) {
		word = set->flow[i];
		fresh = word ? aged(word, tick, holds_mappings(index)) : 0;
		if (fresh != word)
			replace_any(&set->flow[i], word, fresh, holds_mappings(index));
	}
}

/* For xdplb_forget: a backend that was removed, and where remembered flows and SNAT mappings name it. */
struct removal {
	__u32 backend;
	__u32 orphans; /* 1: its clients are to be told, so its flows are kept as BACKEND_GONE's */
	__u32 place[REMOVAL_PLACES];
};

/*
 * The flows of a removed backend, in place of a frame. Its entry is empty already, so no packet writes it into a word any
 * more; but packets move its flows to other backends meanwhile, and those words stay as they are.
 */
static __always_inline void forget_backend(const struct removal *removal)
{
	struct flow_set *set;
	__u64 *place, word;
	__u32 index;

	for (int i = 0; i < REMOVAL_PLACES; i++) {
		index = removal->place[i] / WAYS;
		set = any_set(index);
		if (!set)
			return;
		place = way(set, removal->place[i]);
		word = *place;
		if (FLOW_BACKEND(word) == removal->backend)
			replace_any(place, word, removal->orphans ? orphaned(word) : 0, holds_mappings(index));
	}
}

#endif
