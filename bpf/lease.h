/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Full NAT's places: source addresses and ports of ours, each lent to one flow.
 *
 * One record serves both ways, and its place is its port: a flow's hash names two sets of eight places, and the number of the
 * place that the flow gets there is its source address and port. So there is no allocator and no lock, a compare-and-swap
 * claims a place, and a reply finds its record by one access to an array. The emptier one of the two sets is taken, so that
 * nobody is refused before seven tenths of all places are taken, and hardly anybody for a while then (Azar et al., "Balanced
 * Allocations", 1994).
 *
 * A place holds a word like the flow cache's, which names the backend, and beside it the client. Other than there no open
 * flow is ever driven out: a port belongs to its flow until that closes or has been silent for as long as its state allows.
 * Only a flow that never got beyond its SYN gives way to others sooner.
 */
#ifndef XDPLB_LEASE_H
#define XDPLB_LEASE_H

#include "flow.h"
#include "lookup.h"

#define NO_PLACE 0xffffffff

/* A flow that closed has its port for itself for so many ticks, and longer only while nobody asks for it. */
#define LINGER 2
#define LEASE_TIMEOUTS TIMEOUTS_WITH(LINGER)

/* What an interval of one of our source addresses leads to, in place of a service. */
static __always_inline bool is_source(__u32 target)
{
	return HAVE_FULL_NAT && target & TARGET_SOURCE;
}

static __always_inline struct flow_set *find_lease_set(__u32 index)
{
	return lease_sets.lookup(&index);
}

static __always_inline struct lessee *find_lessee(__u32 place)
{
	return lessees.lookup(&place);
}

/* Who wants a place: a client's flow to a service, by family, with its ports as the client sends them. */
struct applicant {
	struct flow flow;
	struct address client;
	__u32 ports;
	__u32 version;
};

/* `flow` is the flow rule's, whose key may leave out ports. TCP and UDP are never the same service. */
static __always_inline struct applicant applicant(const struct flow *flow, const struct address *client, __u32 ports,
						  __u32 version)
{
	struct applicant a = { .flow = *flow, .client = *client, .ports = ports, .version = version };

	a.flow.key = mix(finish(mix(mix_address(client), ports)), flow->service_id);
	return a;
}

/* The number of a set, of those that give places at addresses of the client's family. */
static __always_inline __u32 lease_set(const struct applicant *a, __u32 hash)
{
	const __u32 first = a->version == 4 ? 0 : SOURCES4 * SETS_PER_SOURCE;
	const __u64 sets = (a->version == 4 ? SOURCES4 : SOURCES6) * SETS_PER_SOURCE;

	return first + (hash * sets >> 32);
}

static __always_inline bool is_lessee(const struct applicant *a, __u32 place)
{
	struct lessee *lessee = find_lessee(place);

	return lessee && same_address(&lessee->client, &a->client) && lessee->ports == a->ports &&
	       lessee->service == a->flow.service_id;
}

/* Where the flow has its place in a set; NO_PLACE where it has none. A fingerprint alone could be a stranger's. */
static __always_inline __u32 find_lease_in(const struct applicant *a, __u32 index)
{
	struct flow_set *set = find_lease_set(index);
	__u32 place = set ? find_flow(set, a->flow.key) : WAYS;

	if (place >= WAYS)
		return NO_PLACE;
	place += index * WAYS;
	return is_lessee(a, place) ? place : NO_PLACE;
}

/* The two sets in which an applicant may have a place. */
static __always_inline __u32 first_choice(const struct applicant *a)
{
	return lease_set(a, a->flow.key >> 32);
}

static __always_inline __u32 second_choice(const struct applicant *a)
{
	return lease_set(a, finish(a->flow.key) >> 32);
}

static __always_inline __u32 find_lease(const struct applicant *a)
{
	__u32 place = find_lease_in(a, first_choice(a));

	return place == NO_PLACE ? find_lease_in(a, second_choice(a)) : place;
}

static __always_inline __u64 lease_word(const struct flow *flow, __u32 backend, __u32 state)
{
	return flow_word(flow, backend, state) & ~FLOW_COUNTED;
}

/* Claims a place of the set that nobody needs for the flow. Its client stands there before a reply can find it. */
static __always_inline __u32 take_lease(const struct applicant *a, __u32 index, __u32 backend)
{
	const struct flow *flow = &a->flow;
	struct flow_set *set = find_lease_set(index);
	__u64 victim, old, claim = lease_word(flow, 0, flow->state);
	struct lessee *lessee;
	__u32 place;

	if (!set)
		return NO_PLACE;
	victim = find_victim(set, flow->tick, LEASE_TIMEOUTS);
	place = index * WAYS + (victim & (WAYS - 1));
	lessee = find_lessee(place);
	old = *way(set, victim);
	if (!lessee || victim >> 3 < SCORE_OPENING || !replace_flow(way(set, victim), old, claim))
		return NO_PLACE;
	lessee->client = a->client;
	lessee->ports = a->ports;
	lessee->service = flow->service_id;
	replace_flow(way(set, victim), claim, lease_word(flow, backend, flow->state));
	return place;
}

/* How many places of a set are free, or as good as. */
static __always_inline __u32 room_in(__u32 index, __u32 tick)
{
	struct flow_set *set = find_lease_set(index);
	__u32 room = 0;

	if (!set)
		return 0;
#pragma unroll
	for (int i = 0; i < WAYS; i++)
		room += 1 - is_zero(score(set->flow[i], tick, LEASE_TIMEOUTS) / SCORE_OPENING);
	return room;
}

/* Notes that the flow lives, by a packet of its backend; `state` is what that adds. */
static __always_inline void renew_lease(__u64 *word, __u32 state)
{
	__u64 old = *word, fresh = (old & ~(0xfffULL << 2)) | (current_tick() & 0xfff) << 2 | state;

	if (fresh != old)
		replace_flow(word, old, fresh);
}

static __always_inline __u64 *lease(__u32 place)
{
	struct flow_set *set = find_lease_set(place / WAYS);

	return set ? way(set, place) : NULL;
}

/* The place of the flow, as the address and port that it stands for. */
static __always_inline bool source_of(__u32 place, struct address *address, __be16 *port)
{
	__u32 index = place / (SETS_PER_SOURCE * WAYS);
	struct address *source = sources.lookup(&index);

	if (!source)
		return false;
	*address = *source;
	*port = be16(FIRST_SOURCE_PORT + place % (SETS_PER_SOURCE * WAYS));
	return true;
}

/*
 * The flow's place, its own or a new one. `*backend` is whom the flow rule says; a place that the flow has says it with more
 * right, because that backend knows the connection, unless a new one begins.
 */
static __always_inline __u32 hold_lease(const struct applicant *a, __u32 *backend)
{
	const struct flow *flow = &a->flow;
	__u32 place = find_lease(a), one, other, known;
	struct backend *entry;
	__u64 *word, old;

	if (place == NO_PLACE) {
		one = first_choice(a);
		other = second_choice(a);
		return take_lease(a, room_in(other, flow->tick) > room_in(one, flow->tick) ? other : one, *backend);
	}
	word = lease(place);
	if (!word)
		return NO_PLACE;
	old = *word;
	known = FLOW_BACKEND(old);
	entry = backends.lookup(&known);
	if ((!flow->anybody || FLOW_STATE(old) == FLOW_OPENING) && serves(flow, entry))
		*backend = known;
	replace_flow(word, old, lease_word(flow, *backend, flow->anybody ? FLOW_OPENING : flow->state | FLOW_STATE(old)));
	return place;
}

/* What a packet to one of our source addresses answers: the flow whose place its port stands for, if its backend is there. */
struct reply_to {
	struct lessee *lessee;
	struct backend *backend;
	struct service *service;
	__u64 *word;
	__u32 id; /* the backend's */
};

static __always_inline bool find_reply_to(__u32 source, __be16 port, const struct address *backend, __be16 backend_port,
					  __u8 protocol, struct reply_to *found)
{
	__u32 place = source * SETS_PER_SOURCE * WAYS + be16(port) - FIRST_SOURCE_PORT;

	found->lessee = find_lessee(place);
	found->word = lease(place);
	if (!found->lessee || !found->word || !*found->word)
		return false;
	found->id = FLOW_BACKEND(*found->word);
	found->backend = backends.lookup(&found->id);
	if (!found->backend || found->backend->service != found->lessee->service)
		return false;
	found->service = services.lookup(&found->backend->service);
	if (!found->service || !same_address(&found->backend->address, backend))
		return false;
	return backend_port == (found->backend->port ? found->backend->port : (__be16)(found->lessee->ports >> 16)) &&
	       (protocol == IPPROTO_UDP) == !!(found->service->flags & SERVICE_UDP);
}

#endif
