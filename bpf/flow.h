/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The flow rule: track only what a change can break (JET, CoNEXT 2021; Beamer, NSDI 2018).
 *
 * A flow of a settled slot needs no memory. In a slot that changed hands
 *  - a SYN goes to the slot's backend, and the flow is remembered. Until a segment follows, that says only that a SYN came: one
 *    that does not follow it is of an older flow (syn_record.h), as if nothing were remembered;
 *  - unless a flow of its ports is remembered that lives. Anybody can send a SYN, so it goes where that flow is, and changes
 *    nothing: the backend that has the connection answers with a challenge (RFC 5961, section 4). Where the flow is closing,
 *    or was silent for TIMEOUT_REUSE, the ports begin anew;
 *  - another packet goes where it is remembered; one of a flow that is not remembered began before the change: it goes to the
 *    backend that the slot had then, while that serves and until the deadline, and is remembered there.
 * What cannot be remembered, for want of place or of budget, is treated as older than the change, SYN or not: all its packets
 * then agree, and a flood breaks nothing.
 *
 * Schedulers that choose have no settled slots: all their flows are remembered. A SYN of such a flow goes to the backend that
 * the scheduler chooses (schedule.h). If that cannot be remembered, its slot decides as for any other.
 */
#ifndef XDPLB_FLOW_H
#define XDPLB_FLOW_H

#include "flow_cache.h"
#include "maps.h"
#include "slots.h"
#include "syn_record.h"

enum outcome {
	OUTCOME_NONE,    /* no backend can take it */
	OUTCOME_BACKEND, /* the one that the decision names */
	OUTCOME_CHOOSE,  /* the scheduler has to choose first (schedule.h) */
	OUTCOME_ORPHAN,  /* its connection's backend was removed, and the client is to be told */
};

/* What was decided for a packet. In this order: in 16 bytes clang would pack outcome and id into one word, and shift. */
struct decision {
	enum outcome outcome;
	struct backend *backend; /* not NULL with OUTCOME_BACKEND only */
	__u32 id;                /* the backend's */
};

static __always_inline struct decision decided(enum outcome outcome)
{
	return (struct decision){ .outcome = outcome };
}

/* `backend` may be NULL: then there is none. */
static __always_inline struct decision decided_on(struct backend *backend, __u32 id)
{
	if (!backend)
		return decided(OUTCOME_NONE);
	return (struct decision){ .outcome = OUTCOME_BACKEND, .id = id, .backend = backend };
}

/* Does the backend, this service's, take packets of flows that it has? */
static __always_inline bool serves(const struct flow *flow, const struct backend *backend)
{
	if (!backend || backend->service != flow->service_id)
		return false;
	return backend->flags & (BACKEND_UP | BACKEND_KEEP);
}

/*
 * The backend that flows older than the slot's last change belong to, and those of one that is down but keeps its flows; or
 * `known`, where that is not 0.
 */
static __always_inline struct backend *find_former(const struct flow *flow, __u32 slot, __u32 index, __u32 known, __u32 *id)
{
	struct transition transition = { .previous = slot & SLOT_BACKEND, .deadline = -1 };
	struct backend *backend;

	if (slot & SLOT_IN_TRANSITION)
		transition = read_transition(index);
	*id = known ? known : flow->tick < transition.deadline ? transition.previous : 0;
	backend = backends.lookup(id);
	return serves(flow, backend) ? backend : NULL;
}

static __always_inline struct backend *find_remembered(const struct flow *flow, __u64 word, __u32 *id)
{
	struct backend *backend;

	*id = FLOW_BACKEND(word);
	backend = backends.lookup(id);
	return serves(flow, backend) ? backend : NULL;
}

/* Notes that the flow lives: at most once a tick, unless its state changes. Two states' bits together are the later one. */
static __always_inline void refresh_flow(__u64 *place, const struct flow *flow, __u64 word)
{
	__u64 fresh = flow_word(flow, FLOW_BACKEND(word), flow->state | FLOW_STATE(word));

	if (word != fresh)
		replace_flow(place, word, fresh);
}

/*
 * Does what is remembered live, so that a SYN on its ports changes nothing? What is established does until it was silent for
 * TIMEOUT_REUSE; what never got beyond its SYN, for so many ticks; what is closing does not.
 */
static __always_inline bool is_in_use(__u64 word, __u32 tick, const __u64 opening)
{
	const __u64 limits = opening << 12 * FLOW_OPENING | (__u64)(TIMEOUT_REUSE) << 12 * FLOW_ESTABLISHED;

	return is_less(idle_ticks(word, tick), limits >> 12 * FLOW_STATE(word) & 0xfff);
}

/*
 * Does what is remembered hold for this packet? One that a backend was chosen for, and that comes again, has it already; a hash
 * finds the same backend anyway.
 */
static __always_inline bool holds(const struct flow *flow, __u64 word)
{
	return !flow->opening || is_in_use(word, flow->tick, HAVE_CHOICE && flow->chooses ? TIMEOUT_OPENING + 1 : 0);
}

/* Is the packet of a connection whose backend was removed, and the service one that says so? */
static __always_inline bool is_orphan(const struct flow *flow, __u32 former)
{
	return former == BACKEND_GONE && flow->service->flags & SERVICE_RESET && !flow->opening && flow->state != FLOW_DATAGRAM;
}

/* Where a packet goes whose slot is in transition, or whose slot's backend is down; remembers what must be remembered. */
static __always_inline struct decision recall(const struct flow *flow, __u32 slot, __u32 index)
{
	struct flow_set *set = find_set(flow);
	__u32 zero = 0, place, id, former_id = 0;
	struct flow_counters *counters = flow_counters.lookup(&zero);
	const bool stateless = flow->service->flags & SERVICE_STATELESS;
	struct backend *backend, *former;
	struct syn_record *record;
	__u64 word, older;

	if (!set || !counters)
		return decided(OUTCOME_NONE);
	place = find_flow(set, flow->key);
	word = place < WAYS ? *way(set, place) : 0;
	record = find_syn_record(flow, word);
	if (!record)
		return decided(OUTCOME_NONE);
	record_syn(record, flow, word);
	older = is_of_older_flow(record, flow, word);
	if (place < WAYS && holds(flow, word) && !stateless && !older) {
		backend = find_remembered(flow, word, &id);
		if (backend) {
			counters->recalled++;
			if (!flow->unverified)
				refresh_flow(way(set, place), flow, word);
			return decided_on(backend, id);
		}
	}
	if (HAVE_CHOICE && flow->chooses)
		return decided(OUTCOME_CHOOSE);
	former = stateless ? NULL : find_former(flow, slot, index, former_of(record, flow) * older, &former_id);
	if (is_orphan(flow, former_id) || is_orphan(flow, FLOW_BACKEND(word)))
		return decided(OUTCOME_ORPHAN);
	backend = former;
	id = former_id;
	if (flow->opening || !former)
		backend = backend_by_hash(flow->service, flow->hash, &id);
	if (!former) {
		former = backend;
		former_id = id;
	}
	if (!backend || stateless || remember_flow(set, flow, place, id, counters))
		return decided_on(backend, id);
	counters->not_remembered++;
	return decided_on(former, former_id);
}

/* The backend that the scheduler chose. None where that is down by now, or the flow finds no place: its slot decides then. */
static __always_inline struct decision follow_choice(const struct flow *flow, __u32 choice)
{
	struct flow_set *set = find_set(flow);
	__u32 zero = 0;
	struct flow_counters *counters = flow_counters.lookup(&zero);
	struct backend *backend = backends.lookup(&choice);

	if (!set || !counters || !backend || backend->service != flow->service_id || !(backend->flags & BACKEND_UP))
		return decided(OUTCOME_NONE);
	if (flow->service->flags & SERVICE_STATELESS || remember_flow(set, flow, find_flow(set, flow->key), choice, counters))
		return decided_on(backend, choice);
	return decided(OUTCOME_NONE);
}

/* The same without a trace, for packets about a flow: ICMP errors, and questions. */
static __always_inline struct backend *look_up_flow(const struct flow *flow, __u32 slot, __u32 index, __u32 *id)
{
	struct flow_set *set = find_set(flow);
	struct backend *backend;
	__u32 place;

	if (!set)
		return NULL;
	if (flow->service->flags & SERVICE_STATELESS)
		return backend_by_hash(flow->service, flow->hash, id);
	place = find_flow(set, flow->key);
	backend = place < WAYS ? find_remembered(flow, *way(set, place), id) : NULL;
	if (!backend)
		backend = find_former(flow, slot, index, 0, id);
	return backend ? backend : backend_by_hash(flow->service, flow->hash, id);
}

#endif
