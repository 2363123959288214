/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Health checks that go the way of a client's packets: `check: {via: vip}`, for dsr, ipip and gue.
 *
 * Their sockets are bound to one end of a veth pair and to an address of this host. xdplb_probe runs on the other end: it sends
 * what they say to the backend that their source port stands for. Answers come from the service's address to an address of
 * this host, where the kernel would not look for the sender: xdplb hands them to xdplb_probe_reply, which sends them into the
 * pair. Nothing here is counted but the verdicts on the interfaces of xdplb.
 */
#ifndef XDPLB_PROBE_H
#define XDPLB_PROBE_H

#include "forward.h"
#include "lookup.h"

/* NULL where the port is not one of a check through this service's address. */
static __always_inline struct probe_way *find_probe_way(__be16 port, const struct address *service)
{
	__u32 number = be16(port) & (MAX_PROBES - 1);
	struct probe_way *way = be16(port) < FIRST_PROBE_PORT ? NULL : probe_ways.lookup(&number);

	return way && same_address(&way->service.address, service) ? way : NULL;
}

static __always_inline int probe(struct packet *p)
{
	struct probe_way *way = find_probe_way(source_port(p), &p->destination);
	__u32 room;

	if (!way || hops_used_up(p))
		return XDP_DROP;
	room = encapsulates(&way->service) ? outer_length(&way->service, &way->backend) : 0;
	if (p->length + room > way->backend.mtu)
		return XDP_DROP;
	take_hop(p);
	if (!wrap(p, &way->service, &way->backend, be16(source_port(p)) * 0x9e3779b1U))
		return XDP_DROP;
	return bpf_redirect(way->backend.ifindex, 0);
}

static __always_inline int probe_reply(struct packet *p)
{
	struct probe_way *way = find_probe_way(destination_port(p), &p->source);
	struct ethhdr *eth = frame_start(p->ctx);

	if (!way || p->link_length != sizeof(*eth) || (void *)(eth + 1) > frame_end(p->ctx))
		return pass();
	set_macs(eth, way->macs);
	return send(p->ctx, way->ifindex);
}

#endif
