/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * IPv4 packets that do not fit the way to their backend and may be fragmented. With nat, this host's kernel does that. Before a
 * tunnel they are cut here, and each fragment is encapsulated (RFC 2003 3.1), so that the backend's kernel puts them together.
 *
 * XDP makes no two frames out of one, but it sends copies of one to all devices of a map. Here each of them is the same one:
 * the inner end of xdplb's own veth pair (xdplb/daemon/probe_link.py). At the outer end each copy becomes another fragment.
 */
#ifndef XDPLB_CUT_H
#define XDPLB_CUT_H

#include "answer.h"
#include "forward.h"
#include "hash.h"

#define ETH_P_ORDER 0x88B5 /* for experiments, IEEE 802: no host's kernel takes it */
#define BROADCAST (1ULL << 3)

/* What to make of the packet behind it. */
struct order {
	__u8 macs[12];
	__be16 type;
	__u16 size;   /* of the payload of each fragment but the last */
	__u32 number; /* the same in all copies of one packet */
	__u32 backend;
	__u32 hash;
};

_Static_assert(sizeof(struct order) == 28, "the IP header behind it is aligned as it was");

/* Copies of a packet arrive together, one after the other. Of which is this one, from 0 on? */
static __always_inline __u32 count_copy(const struct order *order)
{
	__u32 index = order->number % COPY_COUNTS;
	struct copy_count *count = copy_counts.lookup(&index);

	if (!count)
		return COPIES;
	if (count->number != order->number) {
		count->number = order->number;
		count->seen = 0;
	}
	return count->seen++;
}

static __always_inline void count_fragmented(const struct packet *p, __u32 backend)
{
	count_forwarded(backend, p->length, (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN);
}

/* The kernel forwards the translated packet, in fragments. `port` as in by_kernel.h. */
static __always_inline int translate_for_kernel(struct packet *p, const struct backend *backend, __u32 id, __be16 port)
{
	count_fragmented(p, id);
	if (port)
		translate(p, &p->source, port, true);
	translate(p, &backend->address, backend->port, false);
	return pass();
}

/* Sends copies to be cut. */
static __always_inline int order_fragments(struct packet *p, const struct service *service, const struct backend *backend,
					   __u32 id)
{
	__u32 size = (backend->mtu - outer_length(service, backend) - sizeof(struct ipv4hdr)) & 0xfff8;
	__u32 hash = hash_flow(service, &p->source, p->ports);
	struct order *order;
	int zero = 0;

	if (p->ip4->version_ihl != 0x45 || p->transport_length > COPIES * size || p->length > MOST_TO_CUT ||
	    backend->mtu < MIN_MTU_TO_CUT || !copies.lookup(&zero))
		return continue_at(p->ctx, STAGE_ANSWER);
	count_fragmented(p, id);
	take_hop(p);
	if (bpf_xdp_adjust_head(p->ctx, (int)p->link_length - (int)sizeof(*order)))
		return verdict(XDP_ABORTED);
	order = frame_start(p->ctx);
	if ((void *)(order + 1) > frame_end(p->ctx))
		return verdict(XDP_ABORTED);
	*order = (struct order){
		.type = be16(ETH_P_ORDER),
		.size = size,
		.number = bpf_get_prandom_u32(),
		.backend = id,
		.hash = hash,
	};
	verdict(XDP_REDIRECT);
	return copies.redirect_map(0, BROADCAST);
}

/* A packet that is larger than the way to the backend in `call`; it may be answered as well. */
static __always_inline int fragment(struct packet *p, struct tail_call *call)
{
	struct backend *backend = backends.lookup(&call->backend);
	struct service *service = services.lookup(&call->service);
	__u32 id = call->backend;

	if (!backend || !service || p->version != 4)
		return verdict(XDP_ABORTED);
	if (HAVE_NAT && service->forward == FORWARD_NAT)
		return translate_for_kernel(p, backend, id, call->port);
	return encapsulates(service) ? order_fragments(p, service, backend, id) : continue_at(p->ctx, STAGE_ANSWER);
}

static __always_inline bool is_order(struct xdp_md *ctx)
{
	struct order *order = frame_start(ctx);

	return (void *)(order + 1) <= frame_end(ctx) && order->type == be16(ETH_P_ORDER);
}

/* A wrong checksum stays wrong: the fragments of a damaged header must not pass for sound. */
static __always_inline void set_fragment(struct ipv4hdr *ip, __u32 offset, __u32 length, bool last)
{
	__be16 old_length = ip->length, old_fragment = ip->fragment;
	__u16 field = be16(old_fragment);
	__u64 sum;

	ip->length = be16(sizeof(*ip) + length);
	field += offset / 8;
	ip->fragment = be16(last ? field : field | IP_MF);
	sum = csum_change16(csum_change16(0, old_length, ip->length), old_fragment, ip->fragment);
	ip->check = csum_apply(ip->check, sum);
}

/*
 * One fragment out of a copy. The payload stays where it is: the headers move to what of it the fragment has, and the rest is
 * cut off. Nothing is counted, as the packet was.
 */
static __always_inline int cut_fragment(struct xdp_md *ctx)
{
	struct order *order = frame_start(ctx);
	struct ipv4hdr *old = (void *)(order + 1), header;
	struct packet packet = { .ctx = ctx, .link_length = sizeof(struct ethhdr), .version = 4 }, *p = &packet;
	__u32 length, offset, size, hash, id;
	struct backend *backend;
	struct service *service;
	struct ethhdr *eth;

	if ((void *)(old + 1) > frame_end(ctx))
		return XDP_DROP;
	header = *old;
	size = order->size;
	hash = order->hash;
	id = order->backend;
	offset = count_copy(order) * size;
	length = wire_length(header.length) - sizeof(header);
	backend = backends.lookup(&id);
	service = backend ? services.lookup(&backend->service) : NULL;
	if (!service || !service->slot_mask || offset >= length || offset > MOST_TO_CUT)
		return XDP_DROP; /* more copies than there are fragments */
	length -= offset;
	set_fragment(&header, offset, length < size ? length : size, length <= size);
	if (length > size)
		length = size;
	if (bpf_xdp_adjust_head(ctx, sizeof(*order) - sizeof(*eth) + offset))
		return XDP_DROP;
	if (!cut(ctx, sizeof(*eth), sizeof(header) + length))
		return XDP_DROP;
	eth = frame_start(ctx);
	p->end = frame_end(ctx);
	p->ip4 = (void *)(eth + 1);
	if ((void *)(p->ip4 + 1) > p->end)
		return XDP_DROP;
	eth->type = be16(ETH_P_IP);
	*p->ip4 = header;
	p->length = sizeof(header) + length;
	if (!wrap(p, service, backend, hash))
		return XDP_DROP;
	return bpf_redirect(backend->ifindex, 0);
}

#endif
