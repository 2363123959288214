/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Schedulers that choose the backend of a new flow in sequence (rr, wrr) or by load (lc, wlc, p2c), and not by hash.
 *
 * A choice takes several programs, each the tail call of the one before. `struct choice`, one per CPU, goes with it:
 *
 *   xdplb            decide() finds that the scheduler has to choose, and writes the flow into the choice (open_choice).
 *                    -> xdplb_schedule
 *   xdplb_schedule   choose() looks at STRETCH backends, and keeps the best of them in the choice. If there are more:
 *                    -> xdplb_schedule; else it writes the backend that it chose, or BACKEND_GONE: -> xdplb_full
 *   xdplb_full       parses the frame again. If the choice is of its flow, decide() takes it (take_choice), remembers
 *                    the flow, and the packet goes to that backend (follow_choice). If the backend is down by now, or the
 *                    flow finds no place in the cache, the flow's slot decides.
 *
 * xdplb_full opens choices as xdplb does. For full NAT, both only pass the packet on to xdplb_full_nat, and that opens the
 * choice and takes it. A flow that is remembered needs no choice. MAX_BACKENDS_PER_SERVICE backends take 9 calls of
 * xdplb_schedule; the kernel allows 33 tail calls in all.
 *
 * Behind a service's slots the control plane keeps its wrr sequence: each backend as often as it weighs, evenly spread. Behind
 * that it keeps each backend once, for the scheduler that looks at all of them.
 */
#ifndef XDPLB_SCHEDULE_H
#define XDPLB_SCHEDULE_H

#include "count.h"
#include "flow.h"
#include "maps.h"
#include "slots.h"

/* How many entries of the wrr sequence are passed over whose backends went down a moment ago. */
#define SEQUENCE_TRIES 8

/* How many backends are looked at in one call of the program. */
#define STRETCH 512

static __always_inline struct load *find_load(__u32 id)
{
	return loads.lookup(&id);
}

static __always_inline __u32 processor(void)
{
	static __u32 (*get_smp_processor_id)(void) = (void *)8;

	return get_smp_processor_id();
}

/* rr, wrr: the next of the sequence. Every CPU goes through it on its own, from another place on. BACKEND_GONE: none. */
static __always_inline __u32 choose_next(const struct service *service, __u32 service_id)
{
	__u32 *position = wrr_positions.lookup(&service_id), count = service->sequence_length, id, place;
	struct load *load;

	if (!position || !count)
		return BACKEND_GONE;
	for (int i = 0; i < SEQUENCE_TRIES; i++) {
		place = (*position + processor()) % count;
		(*position)++;
		id = read_slot((service->sequence + place) & (SLOTS - 1)) & SLOT_BACKEND;
		load = find_load(id);
		if (load && load->weight)
			return id;
	}
	return BACKEND_GONE;
}

/*
 * Would one more flow load the first backend less than the second? Flows in proportion to weight, the new one counted half
 * (Webster's method of apportionment): so every backend stays within a flow of its share.
 */
static __always_inline bool is_less_busy(__u64 active, __u64 weight, __u64 than_active, __u64 than_weight)
{
	return (2 * active + 1) * than_weight < (2 * than_active + 1) * weight;
}

/*
 * lc, wlc: the next of the sequence if it is idle, else the least busy of all. Those are looked at in stretches: 0 means that
 * there are more. The verifier keeps count of every branch of a loop.
 */
static __always_inline __u32 choose_least_busy(const struct service *service, struct choice *choice)
{
	__u32 first = service->sequence + service->sequence_length, best, id, seen = choice->seen;
	struct load *load;
	__u64 active, weight;

	best = seen ? choice->best : choose_next(service, choice->service);
	load = find_load(best);
	if (!load)
		return BACKEND_GONE;
	active = load->active;
	weight = load->weight;
	if (!active)
		return best;
	for (int i = 0; i < STRETCH; i++) {
		if (seen >= service->members)
			return best;
		id = read_slot((first + seen) & (SLOTS - 1)) & SLOT_BACKEND;
		seen++;
		load = find_load(id);
		if (load && is_less_busy(load->active, load->weight, active, weight)) {
			best = id;
			active = load->active;
			weight = load->weight;
		}
	}
	choice->best = best;
	choice->seen = seen;
	return 0;
}

/*
 * p2c: of two that the slots, which go by weight, name at random the one that has fewer flows for its weight. The first where
 * that is the same: weights would count twice, if idle ones were compared by them.
 */
static __always_inline __u32 choose_of_two(const struct service *service, __u64 key)
{
	__u64 other_key = mix(finish(key), 1);
	__u32 id = read_slot(slot_index(service, finish(key))) & SLOT_BACKEND;
	__u32 other_id = read_slot(slot_index(service, other_key)) & SLOT_BACKEND;
	struct load *load = find_load(id), *other = find_load(other_id);

	if (!load || !other)
		return BACKEND_GONE;
	if (!load->weight || (__u64)other->active * load->weight < (__u64)load->active * other->weight) {
		id = other_id;
		load = other;
	}
	return load->weight ? id : BACKEND_GONE;
}

/* Makes the choice that is open on this CPU: BACKEND_GONE where no backend can be chosen, 0 where that takes another call. */
static __always_inline __u32 choose(struct choice *choice)
{
	struct service *service = services.lookup(&choice->service);

	if (!service)
		return BACKEND_GONE;
	switch (service->scheduler) {
	case SCHEDULER_WRR:
		return choose_next(service, choice->service);
	case SCHEDULER_LEAST:
		return choose_least_busy(service, choice);
	case SCHEDULER_TWO:
		return choose_of_two(service, choice->key);
	default:
		return BACKEND_GONE;
	}
}

/* Does the service's scheduler choose for packets like this, where nothing is remembered of their flow? */
static __always_inline bool is_to_choose(const struct flow *flow)
{
	return flow->service->scheduler != SCHEDULER_HASH && (flow->unverified || flow->state == FLOW_DATAGRAM);
}

/* The backend that was chosen for this flow, once; 0 where none was. */
static __always_inline __u32 take_choice(const struct flow *flow)
{
	__u32 zero = 0, made;
	struct choice *choice = choices.lookup(&zero);

	if (!choice || choice->key != flow->key || choice->service != flow->service_id)
		return 0;
	made = choice->backend;
	choice->backend = 0;
	return made;
}

/* Notes down the choice that is to be made. */
static __always_inline void open_choice(const struct flow *flow)
{
	__u32 zero = 0;
	struct choice *choice = choices.lookup(&zero);

	if (choice)
		*choice = (struct choice){ .key = flow->key, .service = flow->service_id };
}

#endif
