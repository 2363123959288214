/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Whose a flow at a NAT backend is, where its packets alone do not say so: a service's, or the backend's own. By the addresses
 * and ports that the backend sees, its *tuple*. nat.h says which flows are remembered, and what that means.
 *
 * Words, sets and ticks are those of the flow cache (flow_cache.h), in a map apart. Two things are different in a word: its
 * backend is OWN for flows of no service, and bit 31 says that the client's port is another one than the backend sees. Nothing
 * is counted by these words.
 *
 * What can be forged gives way: a place is taken from what has ended, then from what a client began and the backend did not go
 * on with, and only then from the flow that was silent for longest.
 */
#ifndef XDPLB_NAT_FLOWS_H
#define XDPLB_NAT_FLOWS_H

#include "flow_cache.h"
#include "hash.h"
#include "maps.h"

#define OWN BACKEND_GONE
#define NAT_MOVED (1ULL << 31)
#define NAT_OWNER(word) ((word) & (NAT_MOVED | 0x1ffffULL << 14))

/* How far a flow is. But for its beginning, only packets of the backend say that: they cannot be forged from outside. */
enum nat_state {
	NAT_ASKED,    /* a packet to the backend */
	NAT_ANSWERED, /* the backend's SYN-ACK, or its own SYN; a direct connection that is older than our memory */
	NAT_OPEN,
	NAT_CLOSED, /* the backend's FIN or RST */
};

/* For so many ticks an unanswered packet keeps its tuple. */
#define NAT_TIMEOUT_ASKED 4

/* When a flow's place is as good as free: 12 bits for each state. */
#define NAT_TIMEOUTS                                                                                                           \
	((__u64)NAT_TIMEOUT_ASKED << 12 * NAT_ASKED | (__u64)TIMEOUT_ESTABLISHED << 12 * NAT_ANSWERED |                        \
	 (__u64)TIMEOUT_ESTABLISHED << 12 * NAT_OPEN | 2ULL << 12 * NAT_CLOSED)

/* Until when the flow's tuple is its own, though others would like to have it. */
#define NAT_HOLDS(open)                                                                                                        \
	((__u64)NAT_TIMEOUT_ASKED << 12 * NAT_ASKED | (__u64)(open) << 12 * NAT_ANSWERED | (__u64)(open) << 12 * NAT_OPEN |    \
	 (__u64)TIMEOUT_CLOSING << 12 * NAT_CLOSED)

/* What a client and a backend have in common, whatever their ports. */
static __always_inline __u64 nat_pair(const struct address *client, const struct address *backend)
{
	return mix(mix_address(client), backend->hi * HASH_FACTOR + backend->lo);
}

static __always_inline __u64 nat_key(__u64 pair, __be16 client_port, __be16 backend_port, __u32 protocol)
{
	return finish(mix(pair, (__u64)protocol << 32 | (__u32)backend_port << 16 | client_port));
}

/*
 * The other port that a client's flow can have at the backend; and from that one the client's again. The difference is secret
 * and has the uppermost bit.
 */
static __always_inline __be16 other_port(__u64 pair, __be16 port)
{
	return port ^ ((pair >> 40 & 0xffff) | be16(0x8000));
}

static __always_inline __u64 nat_word(__u64 key, __u64 owner, __u32 tick, __u64 state)
{
	return key << 32 | owner | (__u64)(tick & 0xfff) << 2 | state;
}

static __always_inline __u64 nat_owner(__u32 backend, bool moved)
{
	return (__u64)backend << 14 | (moved ? NAT_MOVED : 0);
}

static __always_inline struct flow_set *find_nat_set(__u64 key)
{
	__u32 index = key >> 32 & (NAT_SETS - 1);

	return nat_sets.lookup(&index);
}

/* Where the flow is remembered, or NULL. */
static __always_inline __u64 *find_nat_flow(__u64 key)
{
	struct flow_set *set = find_nat_set(key);
	__u32 place = set ? find_flow(set, key) : WAYS;
	__u64 *found;

	if (!set || place >= WAYS)
		return NULL;
	found = way(set, place);
	return FLOW_BACKEND(*found) ? found : NULL;
}

/* What makes a word the one to be replaced, as in flow_cache.h. What is not open is so at once: a flood lasts no tick. */
static __always_inline __u64 nat_score(__u64 word, __u32 tick)
{
	__u64 idle = idle_ticks(word, tick), timeout = NAT_TIMEOUTS >> 12 * FLOW_STATE(word) & 0xfff;

	return is_zero(word) * SCORE_FREE | is_less(timeout, idle) * SCORE_IDLE | is_zero(word & 2) * SCORE_OPENING | idle;
}

/* Remembers a flow that is not. If another CPU is quicker, the flow's next packet does. */
static __always_inline void claim_nat_flow(__u64 key, __u64 owner, __u32 tick, enum nat_state state)
{
	struct flow_set *set = find_nat_set(key);
	__u64 best = 0, old;

	if (!set)
		return;
#pragma unroll
	for (int i = 0; i < WAYS; i++)
		best = larger(best, nat_score(set->flow[i], tick) << 3 | i);
	old = *way(set, best);
	__sync_val_compare_and_swap(way(set, best), old, nat_word(key, owner, tick, state));
}

/* Changes what is remembered of a flow. `place` is never NULL, but the verifier cannot know. */
static __always_inline void put_nat_flow(__u64 *place, __u64 old, __u64 owner, __u32 tick, __u64 state)
{
	__u64 fresh = nat_word(old >> 32, owner, tick, state);

	if (place && fresh != old)
		__sync_val_compare_and_swap(place, old, fresh);
}

static __always_inline bool is_held(__u64 word, __u32 tick, __u32 protocol)
{
	const __u64 tcp = NAT_HOLDS(TIMEOUT_ESTABLISHED), udp = NAT_HOLDS(TIMEOUT_DATAGRAM);

	return idle_ticks(word, tick) <= ((protocol == IPPROTO_TCP ? tcp : udp) >> 12 * FLOW_STATE(word) & 0xfff);
}

/* Does the packet begin a flow, as far as it can tell? */
static __always_inline bool may_begin(const struct packet *p)
{
	return p->protocol != IPPROTO_TCP || (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

static __always_inline bool begins_connection(const struct packet *p)
{
	return p->protocol == IPPROTO_TCP && (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* Does anything pass the services on its way from or to the backend? */
static __always_inline bool is_looked_at(__u32 backend)
{
	struct nat_hint *hint = nat_hints.lookup(&backend);

	return hint && hint->looks;
}

static __always_inline void look_at(__u32 backend)
{
	struct nat_hint *hint = nat_hints.lookup(&backend);

	if (hint && !hint->looks)
		hint->looks = 1;
}

static __always_inline bool is_remembered(const struct backend *backend, __u32 id)
{
	return backend->flags & BACKEND_PER_FLOW || is_looked_at(id);
}

static __always_inline bool is_remembered_at(__u32 id)
{
	struct backend *backend = backends.lookup(&id);

	return backend && is_remembered(backend, id);
}

/* Does a flow give its tuple up for a packet to a service? What went past the services must have been answered to keep it. */
static __always_inline bool gives_way(__u64 word, __u32 tick, const struct packet *p)
{
	const __u32 least = may_begin(p) ? NAT_ANSWERED : NAT_OPEN;

	return !is_held(word, tick, p->protocol) || (FLOW_BACKEND(word) == OWN && FLOW_STATE(word) < least);
}

/* A client's packet changes no state, but that its SYN after the end is a new beginning. */
static __always_inline __u64 state_by_client(__u64 word, const struct packet *p)
{
	return FLOW_STATE(word) == NAT_CLOSED && begins_connection(p) ? NAT_ASKED : FLOW_STATE(word);
}

/* Notes a client's packet of a flow that is its owner's. */
static __always_inline void refresh_nat_flow(__u64 *place, __u64 word, __u32 tick, const struct packet *p)
{
	put_nat_flow(place, word, NAT_OWNER(word), tick, state_by_client(word, p));
}

/* What the tuple of a client's packet at a NAT backend leads to. */
struct nat_tuple {
	__u64 pair;
	__u64 key;
	__u64 *place; /* where it is remembered, or NULL */
	__u64 word;
};

static __always_inline struct nat_tuple nat_tuple(__u64 pair, __be16 client_port, __be16 backend_port, __u32 protocol)
{
	struct nat_tuple tuple = { .pair = pair, .key = nat_key(pair, client_port, backend_port, protocol) };

	tuple.place = find_nat_flow(tuple.key);
	tuple.word = tuple.place ? *tuple.place : 0;
	return tuple;
}

/* Gives the tuple to a flow. */
static __always_inline void take_tuple(const struct nat_tuple *tuple, __u64 owner, __u32 tick, enum nat_state state)
{
	if (tuple->place)
		put_nat_flow(tuple->place, tuple->word, owner, tick, state);
	else
		claim_nat_flow(tuple->key, owner, tick, state);
}

#endif
