/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The way back from NAT backends. A reply's source (address, protocol, port) names its backend and with it the service; no
 * state is needed for that. Two cases need a memory of the flow, and only they pay for it:
 *
 *  - several services share one (address, protocol, port): flows to such backends are remembered with the backend they took
 *    (BACKEND_SHARED);
 *  - a client talks to the backend's own address through this host: such flows are remembered with backend 0, "leave alone",
 *    and `direct_seen` tells the replies to look.
 */
#ifndef XDPLB_NAT_H
#define XDPLB_NAT_H

#include "count.h"
#include "lookup.h"
#include "rewrite.h"

#define LEAVE_ALONE 0

static __always_inline struct nat_flow_key nat_flow_key(const struct address *client, __be16 client_port,
							const struct address *backend, __be16 backend_port, __u8 protocol)
{
	struct nat_flow_key key = {};

	key.client = *client;
	key.backend = *backend;
	key.client_port = client_port;
	key.backend_port = backend_port;
	key.protocol = protocol;
	return key;
}

/* Remembers, where it is not known already, to which backend (or LEAVE_ALONE) the flow belongs. */
static __always_inline void remember(struct nat_flow_key *key, __u32 backend)
{
	__u32 *known = nat_flows.lookup(key);

	if (!known || *known != backend)
		nat_flows.update(key, &backend);
}

static __always_inline bool is_direct_seen(__u32 backend)
{
	__u32 *seen = direct_seen.lookup(&backend);

	return seen && *seen;
}

/* On the way to a NAT backend: what its replies will need to know beyond their own source. */
static __always_inline void remember_service(const struct packet *p, const struct backend *backend, __u32 id)
{
	struct nat_flow_key key;
	__be16 port = backend->port ? backend->port : destination_port(p);

	if (p->fragment == LATER_FRAGMENT)
		return;
	if (!(backend->flags & BACKEND_SHARED) && !is_direct_seen(id))
		return;
	key = nat_flow_key(&p->source, source_port(p), &backend->address, port, p->protocol);
	remember(&key, id);
}

/* A client that talks to `p->destination`, a NAT backend, without the service. */
static __always_inline void remember_direct(const struct packet *p, struct interval_range replies)
{
	__u32 backend = find_interval(replies, port_key(p->protocol, destination_port(p)));
	struct nat_flow_key key;
	__u32 *seen;

	if (!backend)
		return;
	seen = direct_seen.lookup(&backend);
	if (seen)
		*seen = 1;
	key = nat_flow_key(&p->source, source_port(p), &p->destination, destination_port(p), p->protocol);
	remember(&key, LEAVE_ALONE);
}

/* To which backend entry does a reply from (address, port) to the client belong? 0: to none, it is not ours. */
static __always_inline __u32 find_reply_backend(const struct address *backend_address, struct interval_range replies,
						__be16 backend_port, const struct address *client, __be16 client_port,
						__u8 protocol)
{
	__u32 id = find_interval(replies, port_key(protocol, backend_port));
	struct nat_flow_key key;
	struct backend *backend;
	__u32 *known;

	if (!id)
		return 0;
	backend = backends.lookup(&id);
	if (!backend)
		return 0;
	if (!(backend->flags & BACKEND_SHARED) && !is_direct_seen(id))
		return id;
	key = nat_flow_key(client, client_port, backend_address, backend_port, protocol);
	known = nat_flows.lookup(&key);
	return known ? *known : id;
}

enum route { ROUTE_SEND, ROUTE_KERNEL, ROUTE_KERNEL_UNTOUCHED, ROUTE_TOO_BIG };

/*
 * The kernel's way from here to `destination`. What XDP cannot send itself the kernel gets: translated, where it only has to
 * find the neighbour's MAC first or to fragment; untouched, where it is the addressee or has to tell the backend off.
 */
static __always_inline enum route find_route(const struct packet *p, const struct address *source,
					     const struct address *destination, struct bpf_fib_lookup *fib)
{
	fib->ifindex = ingress(p->ctx);
	fib->tot_len = p->length;
	fib->l4_protocol = p->protocol;
	if (p->version == 4) {
		fib->family = AF_INET;
		fib->tos = p->ip4->tos;
		fib->ipv4_src = unmapped(source);
		fib->ipv4_dst = unmapped(destination);
	} else {
		fib->family = AF_INET6;
		fib->flowinfo = p->ip6->version_class_label & be32(0x0fffffff);
		__builtin_memcpy(fib->ipv6_src, source, sizeof(fib->ipv6_src));
		__builtin_memcpy(fib->ipv6_dst, destination, sizeof(fib->ipv6_dst));
	}
	switch (bpf_fib_lookup(p->ctx, fib, sizeof(*fib), 0)) {
	case BPF_FIB_LKUP_RET_SUCCESS:
		return ROUTE_SEND;
	case BPF_FIB_LKUP_RET_NO_NEIGH:
		return ROUTE_KERNEL;
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		return p->version == 4 && !(p->ip4->fragment & be16(IP_DF)) ? ROUTE_KERNEL : ROUTE_TOO_BIG;
	default:
		return ROUTE_KERNEL_UNTOUCHED;
	}
}

/* Addresses the frame to the next hop that `find_route` found. */
static __always_inline bool address_route(struct xdp_md *ctx, const struct bpf_fib_lookup *fib)
{
	struct ethhdr *eth = frame_start(ctx);

	if ((void *)(eth + 1) > frame_end(ctx))
		return false;
	__builtin_memcpy(eth->macs, fib->dmac, 6);
	__builtin_memcpy(eth->macs + 6, fib->smac, 6);
	return true;
}

static __always_inline int send_route(struct xdp_md *ctx, const struct bpf_fib_lookup *fib)
{
	return address_route(ctx, fib) ? send(ctx, fib->ifindex) : verdict(XDP_ABORTED);
}

/* A reply of backend `id`: it gets the service's address and port for its source, and goes where the kernel's routes lead. */
static __always_inline int reply(struct packet *p, __u32 id)
{
	struct backend *backend = backends.lookup(&id);
	struct service *service = backend ? services.lookup(&backend->service) : NULL;
	struct bpf_fib_lookup fib = {};
	enum route route;

	if (!service || !service->slot_mask || hops_used_up(p))
		return pass();
	route = find_route(p, &service->address, &p->destination, &fib);
	if (route >= ROUTE_KERNEL_UNTOUCHED)
		return pass();
	count_reply(id, p->length);
	translate(p, &service->address, backend->port ? service->port : 0, true);
	if (route == ROUTE_KERNEL)
		return pass();
	take_hop(p);
	return send_route(p->ctx, &fib);
}

#endif
