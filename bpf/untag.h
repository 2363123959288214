/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * VLAN tags end at the gateway, as at any router. A tag names a VLAN of the interface that a frame came in by, or a priority
 * there (VLAN 0). The next hop was found on the interface that the frame leaves by: where that is a VLAN device, it puts its
 * own tag on. What is answered instead of forwarded goes back as it came (answer.h).
 */
#ifndef XDPLB_UNTAG_H
#define XDPLB_UNTAG_H

#include "count.h"
#include "parse.h"

/* Sends a packet on that is addressed to its next hop already. */
static __always_inline int leave(const struct packet *p, __u32 ifindex)
{
	__u32 zero = 0;
	struct tail_call *call;

	if (p->link_length == sizeof(struct ethhdr))
		return send(p->ctx, ifindex);
	call = tail_calls.lookup(&zero);
	if (!call)
		return verdict(XDP_ABORTED);
	call->link_length = p->link_length;
	call->ifindex = ifindex;
	return continue_at(p->ctx, STAGE_UNTAG);
}

/* Takes off tags of `length` bytes. */
static __always_inline bool take_tags_off(struct xdp_md *ctx, const __u32 length)
{
	struct ethhdr *eth = frame_start(ctx), *behind = (void *)eth + length, link;

	if ((void *)(behind + 1) > frame_end(ctx))
		return false;
	link = *eth;
	link.type = behind->type;
	if (bpf_xdp_adjust_head(ctx, length))
		return false;
	eth = frame_start(ctx);
	if ((void *)(eth + 1) > frame_end(ctx))
		return false;
	*eth = link;
	return true;
}

static __always_inline int untag(struct xdp_md *ctx)
{
	const __u32 one = sizeof(struct vlan_tag);
	__u32 zero = 0;
	struct tail_call *call = tail_calls.lookup(&zero);

	if (!call)
		return verdict(XDP_ABORTED);
	if (!(call->link_length == sizeof(struct ethhdr) + one ? take_tags_off(ctx, one) : take_tags_off(ctx, 2 * one)))
		return verdict(XDP_ABORTED);
	return send(ctx, call->ifindex);
}

#endif
