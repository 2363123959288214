/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What would become of a packet, and why: the same look-ups as for real ones, and the same changes. They are written into a
 * struct trace. Nothing is counted, nothing is remembered, nothing is answered. Returns the verdict that the packet would get.
 *
 * Only test runs come here, with packets that the control plane makes: plain ones, so that the quick parser does.
 */
#ifndef XDPLB_EXPLAIN_H
#define XDPLB_EXPLAIN_H

#include "flow.h"
#include "forward.h"
#include "snat.h"
#include "nat.h"
#include "nat_ports.h"
#include "schedule.h"

/* Of use only to the process that asks, so not pinned. */
BPF_F_TABLE("array", __u32, struct trace, traces, 1, BPF_F_MMAPABLE);

/* Is something remembered of the flow, `*word`, and does it say where the packet goes? */
static __always_inline bool explain_memory(const struct flow *flow, __u64 *word)
{
	struct flow_set *set = find_set(flow);
	__u32 place = set ? find_flow(set, flow->key) : WAYS, id;

	if (!set || place >= WAYS)
		return false;
	*word = *way(set, place);
	return !(flow->service->flags & SERVICE_STATELESS) && find_remembered(flow, *word, &id);
}

/* What balance.h's decide() would decide on, and what else was to choose from. */
static __always_inline struct backend *explain_decision(const struct flow *flow, struct trace *trace)
{
	__u32 index = slot_index(flow->service, flow->hash), slot = read_slot(index), id = 0;
	bool recalled = explain_memory(flow, &trace->remembered);
	struct flow syn = { .tick = flow->tick, .opening = true, .chooses = flow->service->scheduler != SCHEDULER_HASH };
	struct backend *backend;

	trace->slots = flow->service->slot_mask + 1;
	trace->slot = (__u32)flow->hash & flow->service->slot_mask;
	trace->slot_word = slot;
	trace->transition = read_transition(index);
	trace->tick = flow->tick;
	if (backend_by_hash(flow->service, flow->hash, &id))
		trace->scheduled = id;
	if (find_former(flow, slot, index, 0, &id))
		trace->former = id;
	trace->in_use = recalled && !by_client(flow->service) && flow->state != FLOW_DATAGRAM && holds(&syn, trace->remembered);
	if (!recalled && (is_orphan(flow, id) || is_orphan(flow, FLOW_BACKEND(trace->remembered))))
		trace->subject = SUBJECT_ORPHAN;
	if (!recalled && HAVE_CHOICE && trace->scheduled && is_to_choose(flow))
		trace->subject = SUBJECT_TO_CHOOSE;

	backend = find_backend(slot, &id);
	if (slot & SLOT_IN_TRANSITION || !backend || !(backend->flags & BACKEND_UP))
		backend = trace->subject == SUBJECT_TO_SERVICE ? look_up_flow(flow, slot, index, &id) : NULL;
	else
		trace->subject = SUBJECT_TO_SERVICE;
	trace->backend = backend ? id : 0;
	return backend;
}

/* The packet is shown as it leaves in the end, also where the kernel forwards it. */
static __always_inline enum xdp_action way_to(struct xdp_md *ctx, const struct backend *backend)
{
	return backend->flags & BACKEND_BY_KERNEL ? XDP_PASS : way_out(ctx, backend->ifindex);
}

/* fullnat.h's way to the backend. A flow that has no SNAT mapping yet keeps its own address and port here. */
static __always_inline int explain_full_nat(struct packet *p, const struct flow *flow, struct backend *backend,
					    struct trace *trace)
{
	struct snat_flow wanted = snat_flow(flow, &p->source, p->ports, p->version);
	__u32 place = find_mapping(&wanted), id = 0;
	__u64 *word = place == NO_PLACE ? NULL : mapping_at(place);
	struct backend *known = NULL;
	struct address source;
	__be16 port;

	if (word) {
		id = knows_better(flow, *word) ? FLOW_BACKEND(*word) : trace->backend;
		known = backends.lookup(&id);
	}
	if (serves(flow, known) && !flow->unverified && source_of(place, &source, &port)) {
		trace->subject = SUBJECT_MAPPED;
		trace->backend = id;
		backend = known;
		translate(p, &source, port, true);
	}
	if (!backend)
		return XDP_DROP;
	trace->ifindex = backend->ifindex;
	trace->largest = backend->mtu;
	take_hop(p);
	translate(p, &backend->address, backend->port, false);
	return address_frame(p->ctx, backend) ? way_to(p->ctx, backend) : XDP_ABORTED;
}

/* nat.h's way to the backend, where its flows are remembered. */
static __always_inline int explain_nat(struct packet *p, const struct flow *flow, const struct backend *backend,
				       struct trace *trace)
{
	struct nat_ports ports = nat_ports(p, backend);
	enum placing placing = place_flow(&ports, p, backend, flow->tick);

	if (placing == PLACE_NONE) {
		trace->subject = SUBJECT_IN_USE;
		return way_out(p->ctx, ingress(p->ctx));
	}
	trace->ifindex = backend->ifindex;
	trace->largest = backend->mtu;
	take_hop(p);
	if (placing == PLACE_OTHER)
		translate(p, &p->source, ports.port, true);
	translate(p, &backend->address, backend->port, false);
	return address_frame(p->ctx, backend) ? way_out(p->ctx, backend->ifindex) : XDP_ABORTED;
}

static __always_inline int explain_balance(struct packet *p, __u32 service_id, struct trace *trace)
{
	struct service *service = services.lookup(&service_id);
	struct backend *backend;
	struct flow flow;

	if (!service)
		return XDP_PASS;
	trace->service = service_id;
	trace->service_flags = service->flags;
	if (is_martian(p)) {
		trace->subject = SUBJECT_MARTIAN;
		return XDP_DROP;
	}
	flow = flow_of(p, service, service_id, hash_flow(service, &p->source, p->ports));
	backend = explain_decision(&flow, trace);
	if (!backend)
		return trace->subject == SUBJECT_ORPHAN || service->flags & SERVICE_REJECT ? way_out(p->ctx, ingress(p->ctx))
											   : XDP_DROP;
	if (HAVE_FULL_NAT && service->forward == FORWARD_FULL_NAT)
		return explain_full_nat(p, &flow, backend, trace);
	if (HAVE_NAT && service->forward == FORWARD_NAT && is_remembered(backend, trace->backend))
		return explain_nat(p, &flow, backend, trace);
	trace->ifindex = backend->ifindex;
	trace->largest = (backend->flags & BACKEND_BY_KERNEL ? backend->kernel_mtu : backend->mtu) -
			 (encapsulates(service) ? outer_length(service, backend) : 0);
	take_hop(p);
	return rewrite(p, service, backend, flow.hash) ? way_to(p->ctx, backend) : XDP_ABORTED;
}

/* nat.h's `reply_from`, uncounted. The largest packet is the kernel's affair. */
static __always_inline int explain_reply(struct packet *p, __u32 id, __be16 moved, struct trace *trace)
{
	struct backend *backend = backends.lookup(&id);
	struct service *service = backend ? services.lookup(&backend->service) : NULL;
	struct bpf_fib_lookup fib = {};
	enum route route;

	if (!service || !service->slot_mask)
		return XDP_PASS;
	trace->subject = SUBJECT_REPLY;
	trace->service = backend->service;
	trace->backend = id;
	route = find_route(p, &service->address, &p->destination, &fib);
	if (route >= ROUTE_KERNEL_UNTOUCHED)
		return XDP_PASS;
	if (moved)
		translate(p, &p->destination, moved, false);
	translate(p, &service->address, backend->port ? service->port : 0, true);
	if (route == ROUTE_KERNEL)
		return XDP_PASS;
	take_hop(p);
	trace->ifindex = fib.ifindex;
	return address_route(p->ctx, &fib) ? way_out(p->ctx, fib.ifindex) : XDP_ABORTED;
}

/* nat.h's `read_reply`, without a trace: a reply, or the backend's own. */
static __always_inline int explain_from_backend(struct packet *p, __u32 named, struct trace *trace)
{
	struct nat_reply reply =
		find_reply(named, &p->source, source_port(p), &p->destination, destination_port(p), p->protocol);

	if (is_challenge(&reply, p))
		reply.id = named;
	if (reply.id && !begins_connection(p))
		return explain_reply(p, reply.id, reply.moved, trace);
	trace->subject = SUBJECT_OWN;
	trace->backend = named;
	return XDP_PASS;
}

#endif
