/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * How many answers there are: as many as the kernel would give (RFC 4443 2.4(f), RFC 1812 4.3.2.8). ICMP errors are limited for
 * each source and in all, by the kernel's defaults (icmp_ratelimit, icmp_msgs_per_sec). Resets and "too big" are no larger than
 * what they answer, and a path's MTU is learnt by the latter: they are limited in all, and generously.
 *
 * A bucket is the moment since when its credit grows. Two sources may share a line: the newcomer begins with a full bucket
 * there, so that nobody can take another's first answer; the total bounds what they gain. CPUs that race give one answer more.
 */
#ifndef XDPLB_ANSWER_LIMIT_H
#define XDPLB_ANSWER_LIMIT_H

#include "hash.h"
#include "maps.h"

#define SECOND 1000000000ULL

/* One more for each period, and so many at once. */
struct rate {
	__u64 period;
	__u64 burst;
};

#define RATE_OF_SOURCE ((struct rate){ .period = SECOND, .burst = 6 })
#define RATE_OF_ERRORS ((struct rate){ .period = SECOND / 1000, .burst = 50 })
#define RATE_OF_OTHERS ((struct rate){ .period = SECOND / 10000, .burst = 1000 })

enum answer_total { TOTAL_RESETS, TOTAL_ERRORS, TOTAL_TOO_BIG };

static __always_inline bool has_credit(__u64 since, __u64 now, const struct rate rate)
{
	return (__s64)(now - since) >= (__s64)rate.period; /* another CPU may have been there a moment later */
}

/* What is left when one answer is paid. */
static __always_inline __u64 paid(__u64 since, __u64 now, const struct rate rate)
{
	__u64 full = now - rate.burst * rate.period;

	return ((__s64)(full - since) > 0 ? full : since) + rate.period;
}

/* May there be an answer of this kind now? If so, it counts. */
static __always_inline bool may_answer(__u32 total)
{
	__u64 *since = answer_totals.lookup(&total), now = bpf_ktime_get_ns();
	const struct rate rate = total == TOTAL_ERRORS ? RATE_OF_ERRORS : RATE_OF_OTHERS;

	if (!since || !has_credit(*since, now, rate))
		return false;
	*since = paid(*since, now, rate);
	return true;
}

/* May the source get an ICMP error now? */
static __always_inline bool may_tell(const struct address *source)
{
	__u64 hash = hash_address(source), now = bpf_ktime_get_ns(), since;
	__u32 index = hash & (ANSWER_BUDGETS - 1);
	struct answer_budget *budget = answer_budgets.lookup(&index);

	if (!budget)
		return false;
	since = budget->source == hash ? budget->since : 0;
	if (!has_credit(since, now, RATE_OF_SOURCE) || !may_answer(TOTAL_ERRORS))
		return false;
	budget->source = hash;
	budget->since = paid(since, now, RATE_OF_SOURCE);
	return true;
}

#endif
