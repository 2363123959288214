/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The flow cache itself: which flow a packet is of, where it stands, and what gives way for it. What is remembered of which
 * packets, and what that means, is the flow rule (flow.h). The control plane reads it with xdplb/core/flow_cache.py.
 *
 * A flow is one word, so that it is read and replaced untorn:
 *
 *   63        32    31    30      14 13     2 1     0
 *   fingerprint | counted |  backend  |  tick | state |
 *
 * The fingerprint is the lower half of the flow's key, in which the slot's number stands as in its hash: the control plane sees
 * from a word which slot it keeps in transition. The upper half chooses the set.
 */
#ifndef XDPLB_FLOW_CACHE_H
#define XDPLB_FLOW_CACHE_H

#include "branchless.h"
#include "count.h"
#include "maps.h"
#include "parse.h"

#define FLOW_STATE(word) ((word) & 3)
#define FLOW_TICK(word) ((word) >> 2 & 0xfff)
#define FLOW_BACKEND(word) ((word) >> 14 & 0x1ffff)
#define FLOW_COUNTED (1ULL << 31)
#define FLOW_FINGERPRINT(word) ((__u32)((word) >> 32))
#define WAYS 8

/*
 * What makes a word the one to be replaced, most wanted first; below them all counts how long it has been idle. SCORE_REFUSED
 * is beside SCORE_OPENING only.
 */
#define SCORE_FREE (1 << 15)
#define SCORE_IDLE (1 << 14)
#define SCORE_OPENING (1 << 13)
#define SCORE_REFUSED (1 << 12)

struct flow {
	const struct service *service;
	__u64 hash;
	__u64 key;
	__u32 service_id;
	__u32 tick;
	__u32 state;
	__u32 sequence;  /* TCP's */
	bool opening;    /* a SYN: begins a flow, unless one of these ports lives */
	bool unverified; /* a SYN: its source address may be forged, so it takes no live flow's place, and refreshes none */
	bool chooses;    /* begins a flow whose backend the scheduler has to choose, unless it is remembered */
};

/* 1 where what is remembered is a client, else 0. */
static __always_inline __u64 by_client(const struct service *service)
{
	return HAVE_AFFINITY ? (service->flags & SERVICE_BY_CLIENT) / SERVICE_BY_CLIENT : 0;
}

/* A second, nearly: the timer interrupts since the start, of which 2^TICK_SHIFT are one. The kernel makes a load of this call.
 */
static __always_inline __u32 current_tick(void)
{
	static __u64 (*jiffies64)(void) = (void *)118;

	return jiffies64() >> TICK_SHIFT;
}

/* The states of TCP flows by the flags FIN, SYN and RST, which are the lowest three: two bits for each combination. */
#define STATE_OF(flags, state) ((__u64)(state) << 2 * (flags))
#define STATES                                                                                                                 \
	(STATE_OF(0, FLOW_ESTABLISHED) | STATE_OF(TCP_SYN, FLOW_OPENING) | STATE_OF(TCP_FIN, FLOW_CLOSING) |                   \
	 STATE_OF(TCP_RST, FLOW_CLOSING) | STATE_OF(TCP_FIN | TCP_SYN, FLOW_CLOSING) |                                         \
	 STATE_OF(TCP_FIN | TCP_RST, FLOW_CLOSING) | STATE_OF(TCP_SYN | TCP_RST, FLOW_CLOSING) |                               \
	 STATE_OF(TCP_FIN | TCP_SYN | TCP_RST, FLOW_CLOSING))

static __always_inline __u32 flow_state(const struct packet *p)
{
	if (p->protocol != IPPROTO_TCP)
		return FLOW_DATAGRAM;
	return STATES >> 2 * (p->tcp_flags & (TCP_FIN | TCP_SYN | TCP_RST)) & 3;
}

/*
 * By what a flow is remembered: its hash, with what that leaves out in the bits above the slot's: the service, and for
 * source-hash the ports, or all flows of a client would be one. The factor spreads them over the sets. With affinity they
 * are one.
 */
static __always_inline __u64 flow_key(const struct service *service, __u32 service_id, __u64 hash, __u32 ports)
{
	__u32 told_apart = ports & ~service->ports_mask & ((__u32)by_client(service) - 1);
	__u32 left_out = service_id ^ told_apart * 0x9E3779B1;

	return hash ^ (__u64)left_out * MAX_SLOTS_PER_SERVICE;
}

/* `hash` is that of the packet's flow. With affinity a client's connections come and go: none of them begins or ends it. */
static __always_inline struct flow flow_of(const struct packet *p, const struct service *service, __u32 service_id, __u64 hash)
{
	struct flow flow = { .service = service, .service_id = service_id, .hash = hash };

	flow.key = flow_key(service, service_id, hash, p->ports);
	flow.tick = current_tick();
	flow.state = flow_state(p);
	flow.sequence =
		be32(((struct tcphdr *)p->transport)->sequence); /* UDP's header is as long, and nothing depends on it */
	flow.unverified = is_zero((p->tcp_flags & (TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK)) ^ TCP_SYN);
	flow.opening = flow.unverified & is_zero(by_client(service));
	if (HAVE_AFFINITY)
		flow.state -= (FLOW_CLOSING - FLOW_ESTABLISHED) * (is_zero(flow.state ^ FLOW_CLOSING) & by_client(service));
	return flow;
}

static __always_inline __u64 flow_word(const struct flow *flow, __u32 backend, __u32 state)
{
	return flow->key << 32 | (state == FLOW_CLOSING ? 0 : FLOW_COUNTED) | (__u64)backend << 14 | (flow->tick & 0xfff) << 2 |
	       state;
}

static __always_inline void count_active(__u64 word, __u32 change)
{
	__u32 id = FLOW_BACKEND(word);
	struct load *load;

	if (!(word & FLOW_COUNTED))
		return;
	load = loads.lookup(&id);
	if (load)
		__sync_fetch_and_add(&load->active, change);
}

/* Puts `new` in the place of `old`, unless another CPU was quicker. */
static __always_inline bool replace_word(__u64 *place, __u64 old, __u64 new)
{
	return __sync_val_compare_and_swap(place, old, new) == old;
}

/* The same, with the counts of backends. All changes of the flow cache go through here. */
static __always_inline bool replace_flow(__u64 *place, __u64 old, __u64 new)
{
	if (!replace_word(place, old, new))
		return false;
	if ((old ^ new) & (FLOW_COUNTED | 0x1ffffULL << 14)) {
		count_active(old, -1);
		count_active(new, 1);
	}
	return true;
}

static __always_inline struct flow_set *find_set(const struct flow *flow)
{
	__u32 index = flow->key >> 32 & (FLOW_SETS - 1);

	return flow_sets.lookup(&index);
}

/* The place in the set where the flow is remembered; WAYS where it is not. One of no backend, which a free word is, is none. */
static __always_inline __u32 find_flow(const struct flow_set *set, __u32 fingerprint)
{
	__u64 found = 0;

#pragma unroll
	for (int i = 0; i < WAYS; i++)
		found |= is_less((set->flow[i] >> 32) ^ fingerprint, 1) << i;
	return lowest_bit(found);
}

static __always_inline __u64 *way(struct flow_set *set, __u32 place)
{
	asm volatile("" : "+r"(place)); /* the verifier wants to see the bound that clang knows already */
	return &set->flow[place & (WAYS - 1)];
}

/* After how many idle ticks a flow counts as ended, by state: 12 bits each. */
#define TIMEOUTS_WITH(closing)                                                                                                 \
	((__u64)TIMEOUT_OPENING << 12 * FLOW_OPENING | (__u64)TIMEOUT_ESTABLISHED << 12 * FLOW_ESTABLISHED |                   \
	 (__u64)(closing) << 12 * FLOW_CLOSING | (__u64)TIMEOUT_DATAGRAM << 12 * FLOW_DATAGRAM)
#define TIMEOUTS TIMEOUTS_WITH(TIMEOUT_CLOSING)

static __always_inline __u64 idle_ticks(__u64 word, __u32 tick)
{
	return (tick - FLOW_TICK(word)) & 0xfff;
}

/* How dispensable a remembered flow is, or (`answered` is not 0) a SNAT mapping: see snat.h. */
static __always_inline __u64 score(__u64 word, __u32 tick, const __u64 timeouts, const __u64 answered)
{
	__u64 idle = idle_ticks(word, tick);
	__u64 timeout = timeouts >> 12 * FLOW_STATE(word) & 0xfff;
	__u64 opening = is_zero(FLOW_STATE(word) ^ FLOW_OPENING) & ~is_zero(idle), refused = 0, unanswered;

	if (answered) {
		unanswered = is_zero(word & answered) & ~is_zero(FLOW_BACKEND(word));
		refused = unanswered & is_zero(FLOW_STATE(word) ^ FLOW_CLOSING);
		opening |= unanswered;
	}
	return is_zero(word) * SCORE_FREE | is_less(timeout, idle) * SCORE_IDLE | opening * SCORE_OPENING |
	       refused * SCORE_REFUSED | idle;
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
 * The more dispensable one of two neighbours: its score, and its place in the lowest three bits. Of several that are alike,
 * `turn` decides.
 */
static __always_inline __u64 rank_pair(const struct flow_set *set, __u32 first, const struct flow *flow, const __u64 timeouts,
				       const __u64 answered)
{
	const __u64 turn = flow->key & (WAYS - 1);

	return larger(score(set->flow[first], flow->tick, timeouts, answered) << 3 | (first ^ turn),
		      score(set->flow[first + 1], flow->tick, timeouts, answered) << 3 | ((first + 1) ^ turn));
}

/*
 * The most dispensable one of a set. Of several that are, another one for each newcomer: in a flood, the one before has its
 * place for a while.
 */
static __always_inline __u64 find_victim(const struct flow_set *set, const struct flow *flow, const __u64 timeouts,
					 const __u64 answered)
{
	const __u64 best =
		larger(larger(rank_pair(set, 0, flow, timeouts, answered), rank_pair(set, 2, flow, timeouts, answered)),
		       larger(rank_pair(set, 4, flow, timeouts, answered), rank_pair(set, 6, flow, timeouts, answered)));

	return best ^ (flow->key & (WAYS - 1));
}

/*
 * The state of a flow that is written where `old` stood. A SYN on the ports of an established flow that was silent may be
 * anybody's: where it goes to the same backend, that flow is as established as before.
 */
static __always_inline __u32 state_after(const struct flow *flow, __u64 old, __u32 backend, bool known)
{
	__u64 same = known * is_zero(FLOW_BACKEND(old) ^ backend) * is_zero(FLOW_STATE(old) ^ FLOW_ESTABLISHED);

	return flow->state | same * FLOW_ESTABLISHED;
}

/*
 * Remembers the flow where it stands already, or in the place of the most dispensable one of its set. An unverified
 * SYN takes the place of no live flow: only of one that ended, or never got beyond its own SYN.
 */
static __always_inline bool remember_flow(struct flow_set *set, const struct flow *flow, __u32 place, __u32 backend,
					  struct flow_counters *counters)
{
	const bool known = place < WAYS;
	__u64 victim = known ? place : find_victim(set, flow, TIMEOUTS, 0), old;

	if (!known && ((flow->unverified && victim >> 3 < SCORE_OPENING) || !within_budget(flow->tick)))
		return false;
	old = *way(set, victim);
	if (!replace_flow(way(set, victim), old, flow_word(flow, backend, state_after(flow, old, backend, known))))
		return false; /* another CPU was quicker */
	if (known)
		return true;
	counters->remembered++;
	if (victim >> 3 < SCORE_OPENING)
		counters->evicted_live++;
	else if (old)
		counters->evicted_idle++;
	return true;
}

#endif
