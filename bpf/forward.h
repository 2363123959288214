/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From a chosen backend to the frame on its way there, by the service's forward mode. */
#ifndef XDPLB_FORWARD_H
#define XDPLB_FORWARD_H

#include "count.h"
#include "encap.h"
#include "rewrite.h"
#include "untag.h"

#define HAVE_TUNNELS (HAVE_IPIP || HAVE_GUE)

static __always_inline bool encapsulates(const struct service *service)
{
	return (HAVE_IPIP && service->forward == FORWARD_IPIP) || (HAVE_GUE && service->forward == FORWARD_GUE);
}

/* Sends the sender an answer in place of the packet. The frame must still be as it came. */
static __always_inline int answer(struct xdp_md *ctx, enum answer kind, __u32 service, __u32 mtu)
{
	__u32 zero = 0;
	struct tail_call *call = tail_calls.lookup(&zero);

	if (call)
		*call = (struct tail_call){ .service = service, .kind = kind, .mtu = mtu };
	return continue_at(ctx, STAGE_ANSWER);
}

/* Has the kernel forward the packet to the backend (by_kernel.h). The frame must still be as it came. */
static __always_inline int leave_to_kernel(struct xdp_md *ctx, __u32 backend)
{
	__u32 zero = 0;
	struct tail_call *call = tail_calls.lookup(&zero);

	if (call) {
		call->backend = backend;
		call->port = 0;
	}
	return continue_at(ctx, STAGE_BY_KERNEL);
}

static __always_inline int no_backend(const struct packet *p, const struct service *service, __u32 id)
{
	if (service->flags & SERVICE_REJECT)
		return answer(p->ctx, ANSWER_REJECT, id, 0);
	return drop(id, REASON(no_backend));
}

static __always_inline bool may_be_fragmented(const struct packet *p)
{
	return HAVE_IPV4 && p->version == 4 && !(p->ip4->fragment & be16(IP_DF)) && !is_icmp(p);
}

/* What may be fragmented is (cut.h); anything else is answered. */
static __always_inline int too_big(const struct packet *p, const struct backend *backend, __u32 id, __u32 room)
{
	__u32 zero = 0;
	struct tail_call *call = tail_calls.lookup(&zero);

	if (call) {
		*call = (struct tail_call){ .service = backend->service, .kind = ANSWER_TOO_BIG, .mtu = backend->mtu - room };
		call->backend = id;
	}
	return continue_at(p->ctx, may_be_fragmented(p) ? STAGE_CUT : STAGE_ANSWER);
}

/*
 * What every mode has in common: fits the way to the backend with `room` for what is put around it, has a hop left, is counted.
 * False where the packet is not to be forwarded; `*action` is what becomes of it then.
 */
static __always_inline bool admit_with(struct packet *p, const struct backend *backend, __u32 id, __u32 room, int *action)
{
	if (hops_used_up(p)) {
		*action = pass();
		return false;
	}
	if (p->length + room > backend->mtu) {
		if (backend->flags & BACKEND_BY_KERNEL)
			*action = leave_to_kernel(p->ctx, id);
		else
			*action = too_big(p, backend, id, room);
		return false;
	}
	count_forwarded(id, p->length, (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN);
	take_hop(p);
	return true;
}

static __always_inline bool admit(struct packet *p, const struct service *service, const struct backend *backend, __u32 id,
				  int *action)
{
	return admit_with(p, backend, id, encapsulates(service) ? outer_length(service, backend) : 0, action);
}

/* Addresses the frame to the next hop on the way to the backend. */
static __always_inline bool address_frame(struct xdp_md *ctx, const struct backend *backend)
{
	struct ethhdr *eth = frame_start(ctx);

	if ((void *)(eth + 1) > frame_end(ctx))
		return false;
	set_macs(eth, backend->macs);
	return true;
}

/* Encapsulates the packet where the mode says so, and addresses it to the next hop. False where the frame has no headroom. */
static __always_inline bool wrap(struct packet *p, const struct service *service, const struct backend *backend, __u32 hash)
{
	if (encapsulates(service) && !encapsulate(p, service, backend, hash))
		return false;
	return address_frame(p->ctx, backend);
}

/* All that the mode changes in a packet to the backend. */
static __always_inline bool rewrite(struct packet *p, const struct service *service, const struct backend *backend, __u32 hash)
{
	if (HAVE_NAT && service->forward == FORWARD_NAT)
		translate(p, &backend->address, backend->port, false);
	return wrap(p, service, backend, hash);
}

/* The rest of the way of a packet that was changed in other ways. */
static __always_inline int emit(struct packet *p, const struct service *service, const struct backend *backend, __u32 hash)
{
	return wrap(p, service, backend, hash) ? leave(p, backend->ifindex) : verdict(XDP_ABORTED);
}

static __always_inline int forward(struct packet *p, const struct service *service, const struct backend *backend, __u32 id,
				   __u64 hash)
{
	int action;

	if (!admit(p, service, backend, id, &action))
		return action;
	return rewrite(p, service, backend, hash) ? leave(p, backend->ifindex) : verdict(XDP_ABORTED);
}

#endif
