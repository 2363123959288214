/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Full NAT's SNAT mappings: each gives one flow a source address and port of this host.
 *
 * A mapping serves both ways, and its place is its port. A flow's hash names two sets of eight places. The number of the
 * place that the flow gets there is its source address and port. So there is no allocator and no lock: a compare-and-swap
 * claims a place, and a reply finds its mapping by one access to an array. The emptier one of the two sets is taken. So no
 * flow is refused before seven tenths of all places are taken, and few are for a while then (Azar et al., "Balanced
 * Allocations", 1994).
 *
 * A mapping is a word like the flow cache's, which names the backend, and beside it the client's tuple. Unlike there, no
 * open flow is ever evicted: a port belongs to its flow until that closes or has been silent for as long as its state
 * allows. Two kinds give theirs up sooner, where no place is free. One is a flow that never got beyond its SYN. The other is
 * one that no backend has answered: anybody can send packets in anybody's name, and make mappings by them. (Linux's conntrack
 * has the same order: early_drop() takes entries without IPS_ASSURED.) A reset is no answer: a spoofed segment gets one too.
 */
#ifndef XDPLB_SNAT_H
#define XDPLB_SNAT_H

#include "flow.h"
#include "lookup.h"

#define NO_PLACE 0xffffffff

/* A flow that closed keeps its port for so many ticks at least, and longer while no other flow needs it. */
#define LINGER 2
#define SNAT_TIMEOUTS TIMEOUTS_WITH(LINGER)

/* A backend has answered. Mappings are not counted, so the bit is free. */
#define SNAT_ANSWERED FLOW_COUNTED

/* Does an interval lead to a source address of full NAT, and not to a service? */
static __always_inline bool is_source(__u32 target)
{
	return HAVE_FULL_NAT && target & TARGET_SOURCE;
}

static __always_inline struct flow_set *find_snat_set(__u32 index)
{
	return snat_sets.lookup(&index);
}

static __always_inline struct snat_tuple *find_snat_tuple(__u32 place)
{
	return snat_tuples.lookup(&place);
}

/* A flow to be mapped: a client's to a service, by family, with its ports as the client sends them. */
struct snat_flow {
	struct flow flow;
	struct address client;
	__u32 ports;
	__u32 version;
};

/* `flow` is the flow rule's, whose key may leave out ports. TCP and UDP are never the same service. */
static __always_inline struct snat_flow snat_flow(const struct flow *flow, const struct address *client, __u32 ports,
						  __u32 version)
{
	struct snat_flow wanted = { .flow = *flow, .client = *client, .ports = ports, .version = version };

	wanted.flow.key = mix(finish(mix(mix_address(client), ports)), flow->service_id);
	return wanted;
}

/* The number of a set, of those whose places are at addresses of the client's family. */
static __always_inline __u32 snat_set(const struct snat_flow *wanted, __u32 hash)
{
	const __u32 first = wanted->version == 4 ? 0 : SOURCES4 * SETS_PER_SOURCE;
	const __u64 sets = (wanted->version == 4 ? SOURCES4 : SOURCES6) * SETS_PER_SOURCE;

	return first + (hash * sets >> 32);
}

static __always_inline bool has_mapping(const struct snat_flow *wanted, __u32 place)
{
	struct snat_tuple *tuple = find_snat_tuple(place);

	return tuple && same_address(&tuple->client, &wanted->client) && tuple->ports == wanted->ports &&
	       tuple->service == wanted->flow.service_id;
}

/* The place of the flow's mapping in a set, or NO_PLACE. A fingerprint alone could be another flow's. */
static __always_inline __u32 find_mapping_in(const struct snat_flow *wanted, __u32 index)
{
	struct flow_set *set = find_snat_set(index);
	__u32 place = set ? find_flow(set, wanted->flow.key) : WAYS;

	if (place >= WAYS)
		return NO_PLACE;
	place += index * WAYS;
	return has_mapping(wanted, place) ? place : NO_PLACE;
}

/* The two sets in which a flow may have its mapping. */
static __always_inline __u32 first_set(const struct snat_flow *wanted)
{
	return snat_set(wanted, wanted->flow.key >> 32);
}

static __always_inline __u32 second_set(const struct snat_flow *wanted)
{
	return snat_set(wanted, finish(wanted->flow.key) >> 32);
}

static __always_inline __u32 find_mapping(const struct snat_flow *wanted)
{
	__u32 place = find_mapping_in(wanted, first_set(wanted));

	return place == NO_PLACE ? find_mapping_in(wanted, second_set(wanted)) : place;
}

static __always_inline __u64 mapping_word(const struct flow *flow, __u32 backend, __u32 state)
{
	return flow_word(flow, backend, state) & ~FLOW_COUNTED;
}

static __always_inline __u64 mapping_score(__u64 word, __u32 tick)
{
	return score(word, tick, SNAT_TIMEOUTS, SNAT_ANSWERED);
}

/* Claims the set's most dispensable place for the flow. Its tuple is written before a reply can find the mapping. */
static __always_inline __u32 make_mapping(const struct snat_flow *wanted, __u32 index, __u32 backend)
{
	const struct flow *flow = &wanted->flow;
	struct flow_set *set = find_snat_set(index);
	__u64 victim, old, claim = mapping_word(flow, 0, flow->state);
	struct snat_tuple *tuple;
	__u32 place;

	if (!set)
		return NO_PLACE;
	victim = find_victim(set, flow, SNAT_TIMEOUTS, SNAT_ANSWERED);
	place = index * WAYS + (victim & (WAYS - 1));
	tuple = find_snat_tuple(place);
	old = *way(set, victim);
	if (!tuple || mapping_score(old, flow->tick) < SCORE_OPENING || !replace_word(way(set, victim), old, claim))
		return NO_PLACE;
	tuple->client = wanted->client;
	tuple->ports = wanted->ports;
	tuple->service = flow->service_id;
	return replace_word(way(set, victim), claim, mapping_word(flow, backend, flow->state)) ? place : NO_PLACE;
}

/* How much room a set has: each place that is free or as good as free counts more than all that would have to be given up. */
static __always_inline __u32 room_in(__u32 index, __u32 tick)
{
	struct flow_set *set = find_snat_set(index);
	__u32 room = 0;
	__u64 scored;

	if (!set)
		return 0;
#pragma unroll
	for (int i = 0; i < WAYS; i++) {
		scored = mapping_score(set->flow[i], tick);
		room += (1 - is_zero(scored / SCORE_IDLE)) * 2 * WAYS + (1 - is_zero(scored / SCORE_OPENING));
	}
	return room;
}

/* Notes that the flow lives, by a packet of its backend. */
static __always_inline void refresh_mapping(__u64 *word, const struct packet *p)
{
	__u64 state = p->tcp_flags & (TCP_FIN | TCP_RST) ? FLOW_CLOSING : 0;
	__u64 answered = is_zero(p->tcp_flags & TCP_RST) * SNAT_ANSWERED;
	__u64 old = *word, fresh = (old & ~(0xfffULL << 2)) | (current_tick() & 0xfff) << 2 | state | answered;

	if (fresh != old)
		replace_word(word, old, fresh);
}

static __always_inline __u64 *mapping_at(__u32 place)
{
	struct flow_set *set = find_snat_set(place / WAYS);

	return set ? way(set, place) : NULL;
}

/* The source address and port that a place stands for. */
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
 * Does a mapping know better than the flow rule where its connection is? While it is opening it does not: the flow rule has the
 * numbers of SYNs (syn_record.h), and a SYN begins anew. Nor where a SYN comes on a mapping that is not in use. Where no flow
 * is remembered, the mapping is all that is known.
 */
static __always_inline bool knows_better(const struct flow *flow, __u64 word)
{
	if (flow->unverified)
		return is_in_use(word, flow->tick, 0);
	return FLOW_STATE(word) != FLOW_OPENING || flow->service->flags & SERVICE_STATELESS;
}

/*
 * The place of the flow's mapping, the one that it has or a new one. `*backend` is the flow rule's, unless the mapping knows
 * better. A SYN changes nothing then.
 */
static __always_inline __u32 get_mapping(const struct snat_flow *wanted, __u32 *backend)
{
	const struct flow *flow = &wanted->flow;
	__u32 place = find_mapping(wanted), one, other, known;
	struct backend *entry;
	__u64 *word, old, answered;
	__u32 state;

	if (place == NO_PLACE) {
		one = first_set(wanted);
		other = second_set(wanted);
		return make_mapping(wanted, room_in(other, flow->tick) > room_in(one, flow->tick) ? other : one, *backend);
	}
	word = mapping_at(place);
	if (!word)
		return NO_PLACE;
	old = *word;
	known = FLOW_BACKEND(old);
	entry = backends.lookup(&known);
	if (knows_better(flow, old) && serves(flow, entry)) {
		*backend = known;
		if (flow->unverified)
			return place;
	}
	state = flow->unverified ? FLOW_OPENING : flow->state | FLOW_STATE(old);
	answered = is_zero(flow->unverified) & is_zero(*backend ^ known);
	replace_word(word, old, mapping_word(flow, *backend, state) | (old & SNAT_ANSWERED * answered));
	return place;
}

/* What a packet to a source address of full NAT replies to: the flow whose mapping has its port, if its backend is there. */
struct reply_to {
	struct snat_tuple *tuple;
	struct backend *backend;
	struct service *service;
	__u64 *word;
	__u32 id; /* the backend's */
};

static __always_inline bool find_reply_to(__u32 source, __be16 port, const struct address *backend, __be16 backend_port,
					  __u8 protocol, struct reply_to *to)
{
	__u32 place = source * SETS_PER_SOURCE * WAYS + be16(port) - FIRST_SOURCE_PORT;

	to->tuple = find_snat_tuple(place);
	to->word = mapping_at(place);
	if (!to->tuple || !to->word || !*to->word)
		return false;
	to->id = FLOW_BACKEND(*to->word);
	to->backend = backends.lookup(&to->id);
	if (!to->backend || to->backend->service != to->tuple->service)
		return false;
	to->service = services.lookup(&to->backend->service);
	if (!to->service || !same_address(&to->backend->address, backend))
		return false;
	return backend_port == (to->backend->port ? to->backend->port : (__be16)(to->tuple->ports >> 16)) &&
	       (protocol == IPPROTO_UDP) == !!(to->service->flags & SERVICE_UDP);
}

#endif
