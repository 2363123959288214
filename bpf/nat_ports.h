/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Which port a flow has at its NAT backend. Two flows can want one tuple there: a client's port is the same towards two
 * services, or towards a service and the backend itself. The second one then gets another port for its source; if that is taken
 * as well, it is refused. Only backends whose flows are remembered pay for that, and a flow that has the client's port pays one
 * look-up.
 */
#ifndef XDPLB_NAT_PORTS_H
#define XDPLB_NAT_PORTS_H

#include "forward.h"
#include "nat_flows.h"
#include "rewrite.h"

/* On to a stage that is about a flow of `backend`. `port` is the client's that the stage is to write, if it is known. */
static __always_inline int continue_with(struct xdp_md *ctx, enum stage stage, __u32 service, __u32 backend, __be16 port)
{
	__u32 zero = 0;
	struct tail_call *call = tail_calls.lookup(&zero);

	if (call)
		*call = (struct tail_call){ .service = service, .backend = backend, .port = port };
	return continue_at(ctx, stage);
}

static __always_inline __be16 port_at(const struct packet *p, const struct backend *backend)
{
	return backend->port ? backend->port : destination_port(p);
}

/*
 * A packet to a service, on its way to NAT backend `id`: may it go there as it is? It takes its tuple, if that is remembered at
 * all. False where that is not simple, and in the program that has no room for it (`full`): xdplb_nat_choose goes on then.
 */
static __always_inline bool keeps_port(const struct packet *p, const struct backend *backend, __u32 id, const bool full)
{
	struct nat_tuple tuple;
	__u32 tick;

	if (!is_remembered(backend, id))
		return true;
	if (full)
		return false;
	tick = current_tick();
	tuple = nat_tuple(nat_pair(&p->source, &backend->address), source_port(p), port_at(p, backend), p->protocol);
	if (NAT_OWNER(tuple.word) == nat_owner(id, false)) {
		refresh_nat_flow(tuple.place, tuple.word, tick, p);
		return true;
	}
	if (tuple.place || !may_begin(p))
		return false;
	claim_nat_flow(tuple.key, nat_owner(id, false), tick, NAT_ASKED);
	return true;
}

/* The ports that a flow can have at its backend: the client's, and the other one. */
struct nat_ports {
	struct nat_tuple own;
	struct nat_tuple other;
	__be16 port;
};

static __always_inline struct nat_ports nat_ports(const struct packet *p, const struct backend *backend)
{
	struct nat_ports ports = {};
	__u64 pair = nat_pair(&p->source, &backend->address);

	ports.port = other_port(pair, source_port(p));
	ports.own = nat_tuple(pair, source_port(p), port_at(p, backend), p->protocol);
	ports.other = nat_tuple(pair, ports.port, port_at(p, backend), p->protocol);
	return ports;
}

enum placing { PLACE_OWN, PLACE_OTHER, PLACE_NONE };

/* Is what is remembered a flow of this backend's service? The same server may have been another backend of it before. */
static __always_inline bool is_of(__u64 word, const struct backend *backend, bool moved)
{
	__u32 id = FLOW_BACKEND(word);
	struct backend *owner = backends.lookup(&id);

	return owner && owner->service == backend->service && !!(word & NAT_MOVED) == moved;
}

/*
 * Which port the flow of a packet to a service gets at the backend. Never one below 1024 if the client's is not: servers give
 * rights to those. A segment of a connection that is not remembered is older than our memory, and has the client's.
 */
static __always_inline enum placing place_flow(const struct nat_ports *ports, const struct packet *p,
					       const struct backend *backend, __u32 tick)
{
	if (is_of(ports->own.word, backend, false))
		return PLACE_OWN;
	if (is_of(ports->other.word, backend, true))
		return PLACE_OTHER;
	if (!may_begin(p) || !ports->own.place || gives_way(ports->own.word, tick, p))
		return PLACE_OWN;
	if (be16(ports->port) >= 1024 && (!ports->other.place || gives_way(ports->other.word, tick, p)))
		return PLACE_OTHER;
	return PLACE_NONE;
}

/* Notes what place_flow said. Whoever has the client's port keeps it while the flow that had to give way for it lives. */
static __always_inline void note_place(const struct nat_ports *ports, const struct packet *p, const struct backend *backend,
				       __u32 id, __u32 tick, bool moved)
{
	const struct nat_tuple *tuple = moved ? &ports->other : &ports->own;
	const __u64 owner = nat_owner(id, moved), holder = NAT_OWNER(ports->own.word);

	if (is_of(tuple->word, backend, moved))
		put_nat_flow(tuple->place, tuple->word, owner, tick, state_by_client(tuple->word, p));
	else if (!tuple->place || gives_way(tuple->word, tick, p))
		take_tuple(tuple, owner, tick, NAT_ASKED);
	if (moved && ports->own.place)
		put_nat_flow(ports->own.place, ports->own.word, holder, tick, FLOW_STATE(ports->own.word));
}

/* A packet to a service whose flow cannot simply have the client's port at the backend: which port has it? */
static __always_inline int choose_port(struct packet *p, struct tail_call *call)
{
	struct backend *backend = backends.lookup(&call->backend);
	__u32 tick = current_tick();
	struct nat_ports ports;
	enum placing placing;

	if (!backend)
		return verdict(XDP_ABORTED);
	ports = nat_ports(p, backend);
	placing = place_flow(&ports, p, backend, tick);
	if (placing == PLACE_NONE)
		return answer(p->ctx, ANSWER_IN_USE, call->service, 0);
	note_place(&ports, p, backend, call->backend, tick, placing == PLACE_OTHER);
	call->port = placing == PLACE_OTHER ? ports.port : source_port(p);
	return continue_at(p->ctx, STAGE_NAT_MOVED);
}

/* On its way with that port. */
static __always_inline int move_to_backend(struct packet *p, const struct tail_call *call)
{
	struct backend *backend = backends.lookup(&call->backend);
	int action;

	if (!backend)
		return verdict(XDP_ABORTED);
	if (hops_used_up(p))
		return pass();
	if (backend->flags & BACKEND_BY_KERNEL)
		return continue_at(p->ctx, STAGE_BY_KERNEL);
	if (p->length > backend->mtu && may_be_fragmented(p))
		return continue_at(p->ctx, STAGE_CUT);
	if (!admit_with(p, backend, call->backend, 0, &action))
		return action;
	translate(p, &p->source, call->port, true);
	translate(p, &backend->address, backend->port, false);
	return address_frame(p->ctx, backend) ? leave(p, backend->ifindex) : verdict(XDP_ABORTED);
}

#endif
