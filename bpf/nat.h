/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Whose a packet of a NAT backend is. A reply's source (address, protocol, port) names its backend and with it the service; for
 * TCP no state is needed for that. But not all that comes from there is a reply:
 *
 *  - a SYN without ACK begins a connection of the backend's own. It is remembered as such, and with it what follows;
 *  - a client talks to the backend's own address through this host: that is remembered in the same way;
 *  - a datagram does not say. It is a reply only to a flow that came through the service, and those are remembered;
 *  - several services share one (address, protocol, port): each of their flows is remembered with its backend entry.
 *
 * So the flows of a backend are remembered if it has BACKEND_PER_FLOW (the last two), or once something passed the service
 * (nat_hints). Where nothing is remembered, a packet is the backend's own with BACKEND_PER_FLOW, else a reply.
 *
 * If a packet past the services would begin a flow whose tuple is one of theirs, it is refused. nat_ports.h has the way there.
 */
#ifndef XDPLB_NAT_H
#define XDPLB_NAT_H

#include "count.h"
#include "forward.h"
#include "lookup.h"
#include "nat_flows.h"
#include "rewrite.h"
#include "untag.h"

/* What a packet from (address, port) to the client is, before one looks at its flags. */
struct nat_reply {
	__u32 id;     /* the backend whose reply it is; 0: of none */
	__be16 moved; /* the client's port, if that is not the packet's; else 0 */
	__u64 *place; /* where its flow is remembered, or NULL */
	__u64 word;
};

static __always_inline struct nat_reply find_reply(__u32 named, const struct address *backend_address, __be16 backend_port,
						   const struct address *client, __be16 client_port, __u32 protocol)
{
	struct nat_reply reply = { .id = named };
	struct backend *backend = backends.lookup(&named);
	struct nat_hint *hint = nat_hints.lookup(&named);
	struct nat_tuple tuple;

	if (!backend || !hint)
		return reply;
	if (!(backend->flags & BACKEND_PER_FLOW) && !hint->looks)
		return reply;
	tuple = nat_tuple(nat_pair(client, backend_address), client_port, backend_port, protocol);
	reply.place = tuple.place;
	reply.word = tuple.word;
	if (tuple.place) {
		reply.id = FLOW_BACKEND(tuple.word) == OWN ? 0 : FLOW_BACKEND(tuple.word);
		reply.moved = tuple.word & NAT_MOVED ? other_port(tuple.pair, client_port) : 0;
	} else if (backend->flags & BACKEND_PER_FLOW && current_tick() >= hint->until) {
		reply.id = 0;
	}
	return reply;
}

/*
 * If a client's direct SYN is answered by anything but a SYN or a reset, then the backend has a connection of this tuple
 * already. That one came through the service, and was not remembered.
 */
static __always_inline bool is_challenge(const struct nat_reply *reply, const struct packet *p)
{
	return reply->place && p->protocol == IPPROTO_TCP && FLOW_BACKEND(reply->word) == OWN &&
	       FLOW_STATE(reply->word) == NAT_ASKED && !(p->tcp_flags & (TCP_SYN | TCP_RST));
}

static __always_inline __u32 state_by_reply(const struct packet *p)
{
	if (p->protocol != IPPROTO_TCP)
		return NAT_OPEN;
	if (p->tcp_flags & (TCP_FIN | TCP_RST))
		return NAT_CLOSED;
	return p->tcp_flags & TCP_SYN ? NAT_ANSWERED : NAT_OPEN;
}

/* The backend opens a connection itself: from now on this is its own tuple. */
static __always_inline void note_own_connection(const struct packet *p, __u32 named)
{
	__u64 pair = nat_pair(&p->destination, &p->source);
	struct nat_tuple tuple = nat_tuple(pair, destination_port(p), source_port(p), p->protocol);

	look_at(named);
	take_tuple(&tuple, nat_owner(OWN, false), current_tick(), NAT_ANSWERED);
}

/* Whose reply is a packet from NAT backend `named`, no SYN? Remembers what it says. */
static __always_inline struct nat_reply read_reply(const struct packet *p, __u32 named)
{
	struct nat_reply reply =
		find_reply(named, &p->source, source_port(p), &p->destination, destination_port(p), p->protocol);
	__u32 state;

	if (!reply.place)
		return reply;
	if (is_challenge(&reply, p)) {
		reply.id = named;
		put_nat_flow(reply.place, reply.word, nat_owner(named, false), current_tick(), NAT_OPEN);
		return reply;
	}
	state = state_by_reply(p);
	if (state < FLOW_STATE(reply.word))
		state = FLOW_STATE(reply.word);
	put_nat_flow(reply.place, reply.word, NAT_OWNER(reply.word), current_tick(), state);
	return reply;
}

/*
 * A packet past the services to NAT backend `id`. False where it must not get there: it would begin a flow whose
 * tuple is one of a service's; `*service` is which one's.
 */
static __always_inline bool may_go_directly(const struct packet *p, __u32 id, __u32 *service)
{
	__u32 tick = current_tick(), owner;
	struct backend *backend;
	struct nat_tuple tuple;

	look_at(id);
	tuple = nat_tuple(nat_pair(&p->source, &p->destination), source_port(p), destination_port(p), p->protocol);
	owner = FLOW_BACKEND(tuple.word);
	if (owner == OWN) {
		refresh_nat_flow(tuple.place, tuple.word, tick, p);
		return true;
	}
	if (tuple.place && !may_begin(p))
		return true;
	if (tuple.place && is_held(tuple.word, tick, p->protocol)) {
		backend = backends.lookup(&owner);
		*service = backend ? backend->service : 0;
		return false;
	}
	if (p->protocol == IPPROTO_TCP && p->tcp_flags & TCP_RST)
		return true;
	take_tuple(&tuple, nat_owner(OWN, false), tick, may_begin(p) ? NAT_ASKED : NAT_ANSWERED);
	return true;
}

/* The backend of whose replies a packet to (or from) one of its addresses and ports would be a part; or 0. */
static __always_inline __u32 find_end(const struct address_entry *entry, __u32 protocol, __be16 port)
{
	return entry && entry->replies.count ? find_interval(entry->replies, port_key(protocol, port)) : 0;
}

/* Past the services, to a NAT backend or from one. */
static __always_inline int pass_services(struct packet *p)
{
	__u32 to = find_end(find_address(p, &p->destination), p->protocol, destination_port(p)), service = 0;

	if (to && !may_go_directly(p, to, &service))
		return answer(p->ctx, ANSWER_IN_USE, service, 0);
	return pass();
}

enum route { ROUTE_SEND, ROUTE_KERNEL, ROUTE_KERNEL_UNTOUCHED, ROUTE_TOO_BIG };

/*
 * The kernel's way from here to `destination`. What XDP cannot send itself the kernel gets: translated, where it only has to
 * find the neighbour's MAC first, to fragment, or to send where XDP cannot; untouched, where it is the addressee or has to tell
 * the backend off.
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
		return can_send(p->ctx, fib->ifindex) ? ROUTE_SEND : ROUTE_KERNEL;
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

static __always_inline int send_route(const struct packet *p, const struct bpf_fib_lookup *fib)
{
	return address_route(p->ctx, fib) ? leave(p, fib->ifindex) : verdict(XDP_ABORTED);
}

/*
 * A reply of backend `id`: it gets the service's address and port for its source, and goes where the kernel's routes lead.
 * `moved`: the client's port, where the backend sees another one; else 0.
 */
static __always_inline int reply_from(struct packet *p, __u32 id, __be16 moved)
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
	if (moved)
		translate(p, &p->destination, moved, false);
	translate(p, &service->address, backend->port ? service->port : 0, true);
	if (route == ROUTE_KERNEL)
		return pass();
	take_hop(p);
	return send_route(p, &fib);
}

static __always_inline int reply(struct packet *p, __u32 id)
{
	return reply_from(p, id, 0);
}

#endif
