/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What tells a new flow from an older one with the same ports: the initial sequence numbers of SYNs.
 *
 * In a slot in transition, a flow that is older than the change may be remembered nowhere. If a SYN comes on its ports, whoever
 * sent it, the flow cache then says where that SYN went. Ports do not tell whose the next segment is. Its sequence number does:
 * the first segments of a new flow follow the SYN's, within a window that the backend can have offered in its SYN-ACK, whether
 * they are an acknowledgement, data before it, or a reset. Those of the older flow do so by chance once in 2^15 times.
 *
 * A record is a cache line of its own, written by SYNs only, and found by the flow's key without a search: a later SYN of
 * another flow takes its place. So it lasts for a handshake and not for much longer. Where it is gone, the flow cache is
 * believed, until the SYN is so long ago that its handshake has failed.
 */
#ifndef XDPLB_SYN_RECORD_H
#define XDPLB_SYN_RECORD_H

#include "flow_cache.h"
#include "maps.h"

/*
 * How far behind its SYN a segment of a new flow may be. The window of a SYN-ACK is not scaled (RFC 7323, section 2.2). The
 * SYN's own number counts as well: a simultaneous open repeats it.
 */
#define FIRST_WINDOW (1 << 16)

static __always_inline __u64 syn_tag(const struct flow *flow, __u64 sequences, __u64 former)
{
	return flow->key ^ sequences ^ former << 40;
}

/* 1 where the record is of the flow's SYNs. */
static __always_inline __u64 is_record_of(const struct syn_record *record, const struct flow *flow)
{
	return is_zero(record->tag ^ syn_tag(flow, record->sequences, record->former));
}

/* 1 where nothing is remembered of a flow but its SYN. */
static __always_inline __u64 is_opening(__u64 word)
{
	return is_zero(FLOW_STATE(word) ^ FLOW_OPENING) * (1 - is_zero(word));
}

/*
 * Whose the ports of a SYN are, if it is not their client's: the backend's of the flow that is remembered, `word`; of none,
 * where that is closing: then what comes late of it must not be taken for a flow that lives. 0: not known.
 */
static __always_inline __u32 owner_of_ports(__u64 word)
{
	return FLOW_STATE(word) == FLOW_CLOSING ? BACKEND_GONE : FLOW_BACKEND(word);
}

/* The flow's record. All packets that need none get the same, so that they touch no cache line of their own. */
static __always_inline struct syn_record *find_syn_record(const struct flow *flow, __u64 word)
{
	__u32 index = (flow->key >> 32 & (SYN_RECORDS - 1)) * (flow->opening | is_opening(word));

	return syn_records.lookup(&index);
}

/*
 * Notes a SYN's number. While its flow is opening, the number of an earlier SYN of the same ports stays beside it: that may be
 * the client's, and this one a stranger's. A SYN that comes again has its number there.
 */
static __always_inline void record_syn(struct syn_record *record, const struct flow *flow, __u64 word)
{
	__u64 known = record->sequences, number = flow->sequence, goes_on = is_record_of(record, flow) * is_opening(word);
	__u64 again = goes_on * (is_zero((__u32)known ^ number) | is_zero(known >> 32 ^ number));
	__u64 skip = is_zero(flow->opening) |
		     again; /* by itself: if the verifier knew more of the flow, it would go on twice */
	__u32 former = is_opening(word) ? 0 : owner_of_ports(word);

	if (skip)
		return;
	known = (goes_on ? known : number) << 32 | number;
	former = goes_on ? record->former : former;
	record->former = former;
	record->sequences = known;
	record->tag = syn_tag(flow, known, former);
}

/* 1 where `sequence` follows the SYN's. */
static __always_inline __u64 follows(__u32 sequence, __u32 syn)
{
	return is_less((__u32)(sequence - syn), FIRST_WINDOW);
}

/*
 * 1 where the flow cache remembers no more of the packet's flow than a SYN, and that was another flow's: its number does not
 * lead to this segment, or nothing is known of it and its time is over. With affinity, what is remembered is no single flow.
 */
static __always_inline __u64 is_of_older_flow(const struct syn_record *record, const struct flow *flow, __u64 word)
{
	__u64 numbers = record->sequences, known = is_record_of(record, flow);
	__u64 fits = follows(flow->sequence, numbers) | follows(flow->sequence, numbers >> 32);
	__u64 over = is_less(TIMEOUT_OPENING, idle_ticks(word, flow->tick));
	__u64 other = (1 - fits) * (1 - is_zero(record->former ^ BACKEND_GONE));

	return either(known, other, over) * is_opening(word) * is_zero(flow->unverified) * is_zero(by_client(flow->service));
}

/* The backend of an older flow, where the record has it; else 0. */
static __always_inline __u32 former_of(const struct syn_record *record, const struct flow *flow)
{
	return record->former * is_record_of(record, flow);
}

#endif
