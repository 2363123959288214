/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The way to backends behind an interface that takes no frames of XDP (BACKEND_BY_KERNEL). The packet is changed as the
 * service's mode says, and then the kernel forwards it: it finds the next hop, and takes a hop of its own. So the frame stays
 * addressed to this host. With dsr the kernel would take the packet for its own: there such backends get nothing.
 */
#ifndef XDPLB_BY_KERNEL_H
#define XDPLB_BY_KERNEL_H

#include "forward.h"
#include "icmp.h"

/* An ICMP error has the flow of the packet that it quotes. */
static __always_inline __u64 hash_of(const struct packet *p, const struct service *service, const struct quoted *q)
{
	if (q->network)
		return hash_flow(service, &q->destination, q->ports >> 16 | q->ports << 16);
	return hash_flow(service, &p->source, p->ports);
}

/* Around the packet, which this host routes into the tunnel: so it takes a hop as well. */
static __always_inline int wrap_for_kernel(struct packet *p, const struct service *service, const struct backend *backend,
					   __u32 hash)
{
	struct ethhdr *eth = frame_start(p->ctx);
	__u8 macs[12] __attribute__((aligned(8)));

	if ((void *)(eth + 1) > p->end)
		return verdict(XDP_ABORTED);
	*(__u64 *)macs = *(__u64 *)eth->macs;
	*(__u32 *)(macs + 8) = *(__u32 *)(eth->macs + 8);
	take_hop(p);
	if (!encapsulate(p, service, backend, hash))
		return verdict(XDP_ABORTED);
	eth = frame_start(p->ctx);
	if ((void *)(eth + 1) > p->end)
		return verdict(XDP_ABORTED);
	set_macs(eth, macs);
	return pass();
}

/* `port` is the source port that a NAT flow has at the backend; 0 where that is its own. */
static __always_inline int by_kernel(struct packet *p, struct quoted *q, __u32 id, __be16 port)
{
	struct backend *backend = backends.lookup(&id);
	struct service *service = backend ? services.lookup(&backend->service) : NULL;
	__u32 room;
	bool nat;

	if (!service)
		return verdict(XDP_ABORTED);
	nat = HAVE_NAT && service->forward == FORWARD_NAT;
	room = encapsulates(service) ? outer_length(service, backend) : 0;
	if (p->length + room > backend->kernel_mtu && !(nat && may_be_fragmented(p)))
		return answer(p->ctx, ANSWER_TOO_BIG, backend->service, backend->kernel_mtu - room);
	count_forwarded(id, p->length, (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN);
	if (encapsulates(service))
		return wrap_for_kernel(p, service, backend, hash_of(p, service, q));
	if (!nat)
		return verdict(XDP_ABORTED);
	if (q->network) {
		translate_error(p, q, backend, id);
		return pass();
	}
	if (port)
		translate(p, &p->source, port, true);
	translate(p, &backend->address, backend->port, false);
	return pass();
}

#endif
