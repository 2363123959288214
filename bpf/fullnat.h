/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Full NAT: the backend sees a connection from an address and a port of this host (snat.h). So its replies come here, whatever
 * its routes are. Both ways, and the ICMP errors about either.
 */
#ifndef XDPLB_FULLNAT_H
#define XDPLB_FULLNAT_H

#include "balance.h"
#include "forward.h"
#include "icmp.h"
#include "snat.h"
#include "lookup.h"
#include "nat.h"

static __always_inline int send_to(struct packet *p, const struct backend *backend)
{
	if (backend->flags & BACKEND_BY_KERNEL) {
		give_hop(p);
		return pass();
	}
	return address_frame(p->ctx, backend) ? leave(p, backend->ifindex) : verdict(XDP_ABORTED);
}

/*
 * The mapping of a flow knew better than the flow rule at which backend it is. What the flow cache remembers follows: else it
 * would count for a backend that does not have it. With affinity, what is remembered is no single flow.
 */
static __always_inline void follow_mapping(const struct flow *flow, __u32 place)
{
	struct flow_set *set = find_set(flow);
	__u32 known = set ? find_flow(set, flow->key) : WAYS;
	__u64 *mapping = mapping_at(place), word;

	if (known >= WAYS || !mapping || by_client(flow->service))
		return;
	word = *mapping;
	replace_flow(way(set, known), *way(set, known), flow_word(flow, FLOW_BACKEND(word), FLOW_STATE(word)));
}

/* To a service: source and destination become the mapping's and the backend's. */
static __always_inline int full_nat_to_backend(struct packet *p, __u32 service_id)
{
	struct service *service = services.lookup(&service_id);
	struct decision decision;
	struct snat_flow wanted;
	struct backend *backend;
	struct address source;
	struct flow flow;
	__u32 id, place;
	__be16 port;
	__u64 hash;
	int action;

	if (!service)
		return pass();
	hash = hash_flow(service, &p->source, p->ports);
	decision = decide(p, service, service_id, hash, true);
	if (decision.outcome != OUTCOME_BACKEND)
		return without_backend(p, service, service_id, decision.outcome);
	id = decision.id;
	flow = flow_of(p, service, service_id, hash);
	wanted = snat_flow(&flow, &p->source, p->ports, p->version);
	wanted.flow.state = flow_state(p); /* a mapping is one connection's, also where the flow rule remembers clients */
	place = get_mapping(&wanted, &id);
	backend = backends.lookup(&id);
	if (place == NO_PLACE || !backend || !source_of(place, &source, &port))
		return drop(service_id, REASON(ports_exhausted));
	if (id != decision.id)
		follow_mapping(&flow, place);
	if (!admit_with(p, backend, id, 0, &action))
		return action;
	translate(p, &source, port, true);
	translate(p, &backend->address, backend->port, false);
	return send_to(p, backend);
}

/* To a source address of full NAT. A packet that has no mapping is the host's own. */
static __always_inline int full_nat_to_client(struct packet *p, __u32 source)
{
	struct bpf_fib_lookup fib = {};
	struct reply_to to = {};
	enum route route;

	if (!find_reply_to(source, destination_port(p), &p->source, source_port(p), p->protocol, &to) || hops_used_up(p))
		return pass_to_kernel(p, true);
	refresh_mapping(to.word, p);
	route = find_route(p, &to.service->address, &to.tuple->client, &fib);
	if (route == ROUTE_TOO_BIG)
		return answer(p->ctx, ANSWER_TOO_BIG, to.tuple->service, fib.tot_len);
	if (route == ROUTE_KERNEL_UNTOUCHED)
		return pass();
	count_reply(to.id, p->length);
	translate(p, &to.tuple->client, to.tuple->ports & 0xffff, false);
	translate(p, &to.service->address, to.backend->port ? to.service->port : 0, true);
	if (route == ROUTE_KERNEL)
		return pass();
	take_hop(p);
	return send_route(p, &fib);
}

/* A packet that the first program saw already; what it leads to, a service or a source address. 0: nothing. */
static __always_inline __u32 parse_full_nat(struct packet *p, struct xdp_md *ctx)
{
	struct address_entry *to;

	if (parse_network(p, ctx, true) != PARSED || p->fragment == LATER_FRAGMENT || parse_transport(p, true) != PARSED)
		return 0;
	to = find_address(p, &p->destination);
	return to ? find_interval(to->services, port_key(p->protocol, destination_port(p))) : 0;
}

/* An error that came to a service's address, about a reply on its way to the client. */
static __always_inline int full_nat_error_to_backend(struct packet *p, struct quoted *q, __u32 service_id)
{
	struct service *service = services.lookup(&service_id);
	struct flow flow = { .service = service, .service_id = service_id, .tick = current_tick() };
	struct snat_flow wanted = snat_flow(&flow, &q->destination, q->ports >> 16 | q->ports << 16, p->version);
	__u32 place = find_mapping(&wanted), id;
	__u64 *word = place == NO_PLACE ? NULL : mapping_at(place), sum;
	struct backend *backend;
	struct address source;
	__be16 port;
	int action;

	if (!word || !source_of(place, &source, &port))
		return pass();
	id = FLOW_BACKEND(*word);
	backend = backends.lookup(&id);
	if (!backend || backend->service != service_id)
		return pass();
	if (!admit_with(p, backend, id, 0, &action))
		return action;
	sum = translate_quoted(p, q, &backend->address, backend->port, true);
	sum += translate_quoted(p, q, &source, port, false);
	sum += replace_outer(p, &backend->address, false);
	sum += replace_outer(p, &source, true); /* the backend may know no way to the router, and doubt what comes from there */
	patch_icmp(p, sum);
	return send_to(p, backend);
}

/* An error that came to a source address, about a client's packet on its way to a backend. */
static __always_inline int full_nat_error_to_client(struct packet *p, struct quoted *q, __u32 source)
{
	struct bpf_fib_lookup fib = {};
	struct reply_to about = {};
	bool from_backend;
	__u64 sum;

	if (!find_reply_to(source, q->ports & 0xffff, &q->destination, q->ports >> 16, q->protocol, &about) || hops_used_up(p))
		return pass_icmp(p->ctx);
	from_backend = same_address(&p->source, &q->destination);
	count_reply(about.id, p->length);
	sum = translate_quoted(p, q, &about.tuple->client, about.tuple->ports & 0xffff, true);
	sum += translate_quoted(p, q, &about.service->address, about.backend->port ? about.service->port : 0, false);
	sum += replace_outer(p, &about.tuple->client, false);
	if (from_backend)
		sum += replace_outer(p, &about.service->address, true);
	patch_icmp(p, sum);
	if (find_route(p, from_backend ? &about.service->address : &p->source, &about.tuple->client, &fib) != ROUTE_SEND)
		return pass();
	take_hop(p);
	return send_route(p, &fib);
}

#endif
