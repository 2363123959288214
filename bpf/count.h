/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Verdicts and their counters. Every way out of a program goes through here, so that the verdicts add up to the packets.
 *
 * A new counter is a field of a struct in abi.h; Python takes its name and place from the compiled program.
 */
#ifndef XDPLB_COUNT_H
#define XDPLB_COUNT_H

#include "frame.h"
#include "links.h"
#include "maps.h"

/* Index of a named counter in the struct that holds it. */
#define REASON(name) (__builtin_offsetof(struct drop_counters, name) / sizeof(__u64))

static __always_inline int verdict(enum xdp_action action)
{
	__u32 zero = 0;
	struct verdict_counters *counters = verdict_counters.lookup(&zero);

	if (counters)
		((__u64 *)counters)[action]++;
	return action;
}

static __always_inline int pass(void)
{
	return verdict(XDP_PASS);
}

static __always_inline void count_reason(__u32 service, __u32 reason)
{
	struct drop_counters *counters = drop_counters.lookup(&service);

	asm volatile("" : "+r"(reason)); /* clang merges the calls, and then thinks the check below is needless */
	if (counters && reason < sizeof(*counters) / sizeof(__u64))
		((__u64 *)counters)[reason]++;
}

static __always_inline int drop(__u32 service, __u32 reason)
{
	count_reason(service, reason);
	return verdict(XDP_DROP);
}

/* How to leave by the interface `ifindex`. A veth loses what XDP_TX sends unless its peer runs XDP as well; redirecting works.
 */
static __always_inline enum xdp_action way_out(struct xdp_md *ctx, __u32 ifindex)
{
	return ifindex == ingress(ctx) && !TX_BY_REDIRECT ? XDP_TX : XDP_REDIRECT;
}

/* Can frames leave by the interface? If not, the control plane hears that some should have. */
static __always_inline bool can_send(struct xdp_md *ctx, __u32 ifindex)
{
	__u32 index = ifindex % LINKS_MISSED, *missed;

	if (way_out(ctx, ifindex) == XDP_TX || !link_has(ifindex, LINK_TAKES_NO_FRAMES))
		return true;
	missed = links_missed.lookup(&index);
	if (missed)
		*missed = ifindex;
	return false;
}

static __always_inline int send(struct xdp_md *ctx, __u32 ifindex)
{
	if (way_out(ctx, ifindex) == XDP_TX)
		return verdict(XDP_TX);
	verdict(XDP_REDIRECT);
	return bpf_redirect(ifindex, 0);
}

/* Back to where the frame came from. */
static __always_inline int send_back(struct xdp_md *ctx)
{
	return send(ctx, ingress(ctx));
}

static __always_inline void count_forwarded(__u32 backend, __u32 bytes, bool new_flow)
{
	struct backend_counters *counters = backend_counters.lookup(&backend);

	if (!counters)
		return;
	counters->packets++;
	counters->bytes += bytes;
	counters->new_flows += new_flow;
}

static __always_inline void count_reply(__u32 backend, __u32 bytes)
{
	struct backend_counters *counters = backend_counters.lookup(&backend);

	if (!counters)
		return;
	counters->reply_packets++;
	counters->reply_bytes += bytes;
}

/* On to another program, which parses the frame again. What it cannot find there goes into struct tail_call. */
static __always_inline int continue_at(struct xdp_md *ctx, enum stage stage)
{
	stages.call(ctx, stage);
	return verdict(XDP_ABORTED);
}

#endif
