/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The flow cache: track only what a change can break (JET, CoNEXT 2021; Beamer, NSDI 2018).
 *
 * A flow of a settled slot needs no memory. In a slot that changed hands
 *  - a SYN goes to the slot's backend, and the flow is remembered;
 *  - another packet goes where it is remembered; one of a flow that is not remembered began before the change: it goes to the
 *    backend that the slot had then, while that serves and until the deadline, and is remembered there.
 * What cannot be remembered, for want of place or of budget, is treated as older than the change, SYN or not: all its packets
 * then agree, and a flood breaks nothing.
 *
 * A flow is one word, so that it is read and replaced untorn:
 *
 *   63        32 31      14 13     2 1     0
 *   fingerprint |  backend  |  tick | state |
 *
 * The fingerprint is the lower half of the flow's key, in which the slot's number stands as in its hash: the control plane sees
 * from a word which slot it keeps in transition. The upper half chooses the set.
 */
#ifndef XDPLB_FLOW_H
#define XDPLB_FLOW_H

#include "count.h"
#include "maps.h"
#include "parse.h"
#include "slots.h"

#define FLOW_STATE(word) ((word) & 3)
#define FLOW_TICK(word) ((word) >> 2 & 0xfff)
#define FLOW_BACKEND(word) ((word) >> 14 & 0x3ffff)
#define FLOW_FINGERPRINT(word) ((__u32)((word) >> 32))
#define WAYS 8

/* What makes a word the one to be replaced, most wanted first; below them all counts how long it has been idle. */
#define SCORE_FREE (1 << 15)
#define SCORE_IDLE (1 << 14)
#define SCORE_OPENING (1 << 13)

struct flow {
	const struct service *service;
	__u64 hash;
	__u64 key;
	__u32 service_id;
	__u32 tick;
	__u32 state;
	bool opening; /* a SYN: whatever was remembered of these ports is over */
};

/* A second, nearly: the timer interrupts since the start, of which 2^TICK_SHIFT are one. The kernel makes a load of this call.
 */
static __always_inline __u32 current_tick(void)
{
	static __u64 (*jiffies64)(void) = (void *)118;

	return jiffies64() >> TICK_SHIFT;
}

static __always_inline __u32 flow_state(const struct packet *p)
{
	if (p->protocol != IPPROTO_TCP)
		return FLOW_DATAGRAM;
	if (p->tcp_flags & (TCP_FIN | TCP_RST))
		return FLOW_CLOSING;
	return p->tcp_flags & TCP_SYN ? FLOW_OPENING : FLOW_ESTABLISHED;
}

/*
 * By what a flow is remembered: its hash, with what that leaves out in the bits above the slot's: the service, and for
 * source-hash the ports, or all flows of a client would be one. The factor spreads them over the sets.
 */
static __always_inline __u64 flow_key(const struct service *service, __u32 service_id, __u64 hash, __u32 ports)
{
	__u32 left_out = service_id ^ (ports & ~service->ports_mask) * 0x9E3779B1;

	return hash ^ (__u64)left_out * MAX_SLOTS_PER_SERVICE;
}

static __always_inline __u64 flow_word(const struct flow *flow, __u32 backend)
{
	return flow->key << 32 | (__u64)backend << 14 | (flow->tick & 0xfff) << 2 | flow->state;
}

static __always_inline struct flow_set *find_set(const struct flow *flow)
{
	__u32 index = flow->key >> 32 & (FLOW_SETS - 1);

	return flow_sets.lookup(&index);
}

/*
 * Comparisons without a branch: with eight ways and a branch for each, the verifier would follow every combination. The
 * barriers keep clang from seeing what is meant, and putting the branches back.
 */
static __always_inline __u64 is_zero(__u64 x)
{
	__u64 sign = ~(x | -x);

	asm volatile("" : "+r"(sign));
	return sign >> 63;
}

/* All ones where a < b, else 0; for numbers below 2^63. */
static __always_inline __u64 mask_less(__u64 a, __u64 b)
{
	__s64 difference = a - b;

	asm volatile("" : "+r"(difference));
	return difference >> 63;
}

/* The place in the set where the flow is remembered; WAYS where it is not. One of no backend, which a free word is, is none. */
static __always_inline __u32 find_flow(const struct flow_set *set, __u32 fingerprint)
{
	__u64 place = WAYS, found;

#pragma unroll
	for (int i = 0; i < WAYS; i++) {
		found = mask_less((set->flow[i] >> 32) ^ fingerprint, 1);
		place ^= (place ^ i) & found;
	}
	return place;
}

static __always_inline __u64 *way(struct flow_set *set, __u32 place)
{
	asm volatile("" : "+r"(place)); /* the verifier wants to see the bound that clang knows already */
	return &set->flow[place & (WAYS - 1)];
}

/* After how many idle ticks a flow counts as ended, by state: 12 bits each. */
#define TIMEOUTS                                                                                                               \
	((__u64)TIMEOUT_OPENING << 12 * FLOW_OPENING | (__u64)TIMEOUT_ESTABLISHED << 12 * FLOW_ESTABLISHED |                   \
	 (__u64)TIMEOUT_CLOSING << 12 * FLOW_CLOSING | (__u64)TIMEOUT_DATAGRAM << 12 * FLOW_DATAGRAM)

/* How dispensable a remembered flow is. */
static __always_inline __u64 score(__u64 word, __u32 tick)
{
	__u64 idle = (tick - FLOW_TICK(word)) & 0xfff;
	__u64 timeout = TIMEOUTS >> 12 * FLOW_STATE(word) & 0xfff;

	return is_zero(word) * SCORE_FREE | (mask_less(timeout, idle) & SCORE_IDLE) |
	       (is_zero(FLOW_STATE(word) ^ FLOW_OPENING) & ~is_zero(idle)) * SCORE_OPENING | idle;
}

static __always_inline bool within_budget(__u32 tick)
{
	__u32 zero = 0;
	struct flow_budget *budget = flow_budgets.lookup(&zero);

	if (!budget)
		return false;
	if (budget->tick != tick)
		*budget = (struct flow_budget){ .tick = tick };
	return budget->used++ < FLOW_BUDGET;
}

/*
 * Remembers the flow in the place of the most dispensable one of its set. A SYN, which anybody can send, takes the place of no
 * live flow: only of one that ended, or never got beyond its own SYN.
 */
static __always_inline bool remember_flow(struct flow_set *set, const struct flow *flow, __u32 backend,
					  struct flow_counters *counters)
{
	__u64 best = 0, ranked, better, old;
	__u32 victim;

#pragma unroll
	for (int i = 0; i < WAYS; i++) {
		ranked = score(set->flow[i], flow->tick) << 3 | i;
		better = mask_less(best, ranked);
		best = (best & ~better) | (ranked & better);
	}
	victim = best & (WAYS - 1);
	best >>= 3;
	if ((flow->opening && best < SCORE_OPENING) || !within_budget(flow->tick)) {
		counters->not_remembered++;
		return false;
	}
	old = *way(set, victim);
	if (__sync_val_compare_and_swap(way(set, victim), old, flow_word(flow, backend)) != old) {
		counters->not_remembered++; /* another CPU was quicker */
		return false;
	}
	counters->remembered++;
	if (best < SCORE_OPENING)
		counters->evicted_live++;
	else if (old)
		counters->evicted_idle++;
	return true;
}

/* Does the backend, this service's, take packets of flows that it has? */
static __always_inline bool serves(const struct flow *flow, const struct backend *backend)
{
	if (!backend || backend->service != flow->service_id)
		return false;
	return backend->flags & (BACKEND_UP | BACKEND_KEEP);
}

/* The backend that flows older than the slot's last change belong to, and those of one that is down but keeps its flows. */
static __always_inline struct backend *find_former(const struct flow *flow, __u32 slot, __u32 index, __u32 *id)
{
	struct transition transition = { .previous = slot & SLOT_BACKEND, .deadline = -1 };
	struct backend *backend;

	if (slot & SLOT_IN_TRANSITION)
		transition = read_transition(index);
	*id = transition.previous;
	backend = backends.lookup(id);
	return flow->tick < transition.deadline && serves(flow, backend) ? backend : NULL;
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
	__u64 fresh = flow_word(flow, FLOW_BACKEND(word)) | FLOW_STATE(word);

	if (word != fresh)
		__sync_val_compare_and_swap(place, word, fresh);
}

/*
 * Where a packet goes whose slot is in transition, or whose slot's backend is down; remembers what must be remembered.
 * `slot` is the word, `index` its place. The scheduler's loop stands here once only: the verifier follows it each time.
 */
static __always_inline struct backend *recall(const struct flow *flow, __u32 slot, __u32 index, __u32 *id)
{
	struct flow_set *set = find_set(flow);
	__u32 zero = 0, place, former_id = 0;
	struct flow_counters *counters = flow_counters.lookup(&zero);
	const bool stateless = flow->service->flags & SERVICE_STATELESS;
	struct backend *backend, *former;
	__u64 word;

	if (!set || !counters)
		return NULL;
	place = find_flow(set, flow->key);
	word = *way(set, place);
	if (place < WAYS && !flow->opening && !stateless) {
		backend = find_remembered(flow, word, id);
		if (backend) {
			counters->recalled++;
			refresh_flow(way(set, place), flow, word);
			return backend;
		}
	}
	former = stateless ? NULL : find_former(flow, slot, index, &former_id);
	backend = former;
	*id = former_id;
	if (flow->opening || !former)
		backend = schedule(flow->service, flow->hash, id);
	if (!backend || stateless)
		return backend;
	if (place < WAYS) { /* its backend is gone, or its ports begin anew */
		*way(set, place) = flow_word(flow, *id);
		return backend;
	}
	if (remember_flow(set, flow, *id, counters) || !former)
		return backend;
	*id = former_id;
	return former;
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
		return schedule(flow->service, flow->hash, id);
	place = find_flow(set, flow->key);
	backend = place < WAYS ? find_remembered(flow, *way(set, place), id) : NULL;
	if (!backend)
		backend = find_former(flow, slot, index, id);
	return backend ? backend : schedule(flow->service, flow->hash, id);
}

#endif
