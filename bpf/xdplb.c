/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * xdplb's packet path. README.md beside this file walks one packet through it.
 *
 * Each function named xdplb* is a program. Packets meet `xdplb`, which finishes nearly all of them. The others are stages: a
 * program goes on in one by a tail call (continue_at), and the stage begins again with the frame.
 *
 *   xdplb_full              the same code with all of it compiled in (`full`): VLAN tags, options, extension headers, fragments
 *   xdplb_schedule          chooses a backend where no hash does (schedule.h)
 *   xdplb_icmp, _icmp_reply errors about a flow of a service, or about a packet to a NAT backend
 *   xdplb_full_nat, and its _reply, _icmp and _icmp_reply: that forward mode, both ways
 *   xdplb_nat_read          whose a NAT backend's packet is, where `xdplb_full` has no room for that; what passes the services
 *   xdplb_nat_reply         and on the way to the client
 *   xdplb_nat_choose        which port a client's flow has at its NAT backend, likewise, and if others want the same
 *   xdplb_nat_moved         and on the way there
 *   xdplb_probe, _reply     health checks through a service's address; the former runs on an interface of its own
 *   xdplb_by_kernel         changes packets that the kernel forwards, where XDP cannot send them (by_kernel.h)
 *   xdplb_untag             takes VLAN tags off what is forwarded
 *   xdplb_tunnel_error      reports about encapsulated packets
 *   xdplb_cut               fragments that fit; for a tunnel its other half is in xdplb_probe
 *   xdplb_answer            makes the balancer's own replies
 *   xdplb_sweep, _forget    see no packet: the control plane runs them to age the flow cache, and when it removes a backend
 *   xdplb_explain           sees the packets that the control plane makes up
 *
 * bcc compiles all files as one (xdplb/dataplane/bundle.py): `map.lookup()` is its C. HAVE_*, STAGE_* and other constants come
 * from xdplb/abi.py by -D; a part whose HAVE_* is 0 is not in the program.
 */
#include "abi.h"
#include "branchless.h"
#include "maps.h"
#include "frame.h"
#include "hash.h"
#include "csum.h"
#include "count.h"
#include "links.h"
#include "parse.h"
#include "lookup.h"
#include "slots.h"
#include "flow_cache.h"
#include "flow.h"
#include "schedule.h"
#include "sweep.h"
#include "rewrite.h"
#include "encap.h"
#include "untag.h"
#include "forward.h"
#include "nat_flows.h"
#include "nat_ports.h"
#include "nat.h"
#include "fragment.h"
#include "watchdog.h"
#include "snat.h"
#include "icmp.h"
#include "by_kernel.h"
#include "answer.h"
#include "answer_limit.h"
#include "tunnel_mtu.h"
#include "balance.h"
#include "fullnat.h"
#include "cut.h"
#include "probe.h"
#include "explain.h"

/* For a service's address and port: choose a backend, send the packet there. */
static __always_inline int balance(struct packet *p, __u32 service_id, const bool full)
{
	struct service *service = services.lookup(&service_id);
	struct decision decision;
	__u64 hash;

	if (is_source(service_id))
		return continue_at(p->ctx, STAGE_FULL_NAT_REPLY);
	if (!service)
		return pass();
	if (is_martian(p))
		return drop(service_id, REASON(martian_source));
	if (HAVE_FULL_NAT && service->forward == FORWARD_FULL_NAT)
		return continue_at(p->ctx, STAGE_FULL_NAT);
	hash = hash_flow(service, &p->source, p->ports);
	decision = decide(p, service, service_id, hash, full);
	if (decision.outcome != OUTCOME_BACKEND)
		return without_backend(p, service, service_id, decision.outcome);
	if (full)
		teach_fragments(p, decision.id, false);
	if (HAVE_NAT && service->forward == FORWARD_NAT && !keeps_port(p, decision.backend, decision.id, full))
		return continue_with(p->ctx, STAGE_NAT_CHOOSE, service_id, decision.id, 0);
	return forward(p, service, decision.backend, decision.id, hash);
}

/* For no service: maybe a reply of a NAT backend, maybe past the service to one. `to` is what is known at its destination. */
static __always_inline int not_for_service(struct packet *p, const struct address_entry *to, const bool full)
{
	struct address_entry *from = find_address(p, &p->source);
	struct nat_reply from_backend = {};
	__u32 named;

	if (!(from && from->replies.count) && !(to && to->replies.count))
		return pass();
	if (full && p->fragment == LATER_FRAGMENT)
		return later_fragment(p, (struct interval_range){});
	switch (parse_transport(p, full)) {
	case PARSED:
		break;
	case PARSE_FULL:
		return continue_at(p->ctx, STAGE_FULL);
	default:
		return pass();
	}
	named = find_end(from, p->protocol, source_port(p));
	if (named && (begins_connection(p) || (full && is_remembered_at(named))))
		return continue_at(p->ctx, STAGE_NAT_READ);
	if (full)
		from_backend.id = named;
	else if (named)
		from_backend = read_reply(p, named);
	if (!from_backend.id)
		return find_end(to, p->protocol, destination_port(p)) ? continue_at(p->ctx, STAGE_NAT_READ) : pass();
	if (full)
		teach_fragments(p, from_backend.id, true);
	if (from_backend.moved)
		return continue_with(p->ctx, STAGE_NAT_REPLY, 0, from_backend.id, from_backend.moved);
	return reply(p, from_backend.id);
}

static __always_inline int process(struct xdp_md *ctx, const bool full)
{
	struct packet packet = {}, *p = &packet;
	struct address_entry *to;
	enum parsed parsed;
	__u32 service;
	bool probe;

	if (HAVE_WATCHDOG && !full && control_is_lost())
		return pass();
	parsed = parse_network(p, ctx, full);
	if (parsed == PARSE_OTHER)
		return pass(); /* not IP */
	if (!full && parsed == PARSE_FULL && p->version == 0)
		return is_for_others(p) ? pass() : continue_at(ctx, STAGE_FULL); /* tagged */

	to = find_address(p, &p->destination);
	if (!to || !to->services.count) {
		probe = HAVE_PROBES && !to && parsed != PARSE_MALFORMED && is_listening(p, &p->source);
		if (!probe && parsed == PARSE_MALFORMED)
			return pass(); /* not ours */
		if (!probe && !HAVE_NAT && !(HAVE_TUNNELS && is_icmp(p)))
			return pass();
		if (!full && is_for_others(p))
			return pass();
		if (probe)
			return continue_at(ctx, STAGE_PROBE_REPLY); /* to a check through a service? */
		if (is_icmp(p))
			return continue_at(ctx, HAVE_NAT ? STAGE_ICMP_REPLY : STAGE_TUNNEL_ERROR);
		if (!full && parsed == PARSE_FULL)
			return continue_at(ctx, STAGE_FULL);
		return not_for_service(p, to, full);
	}
	if (!full && is_for_others(p))
		return pass();
	if (parsed == PARSE_MALFORMED)
		return drop(0, REASON(malformed));
	if (is_icmp(p))
		return continue_at(ctx, STAGE_ICMP);
	if (parsed == PARSE_FULL)
		return continue_at(ctx, STAGE_FULL); /* options, fragments */
	if (full && p->fragment == LATER_FRAGMENT)
		return later_fragment(p, to->services);
	switch (parse_transport(p, full)) {
	case PARSED:
		break;
	case PARSE_FULL:
		return continue_at(ctx, STAGE_FULL); /* extension headers */
	case PARSE_MALFORMED:
		return drop(0, REASON(malformed));
	default:
		return pass_to_kernel(p, full); /* neither TCP nor UDP */
	}
	service = find_interval(to->services, port_key(p->protocol, destination_port(p)));
	if (!service)
		return pass_to_kernel(p, full); /* another port of that address */
	return balance(p, service, full);
}

int xdplb(struct xdp_md *ctx)
{
	return process(ctx, false);
}

int xdplb_full(struct xdp_md *ctx)
{
	return process(ctx, true);
}

/* An ICMP error and what it quotes; PARSE_OTHER for echo and the like, which are the kernel's. */
static __always_inline enum parsed parse_icmp(struct packet *p, struct xdp_md *ctx, struct quoted *quoted)
{
	enum parsed parsed = parse_network(p, ctx, true);

	if (parsed != PARSED)
		return parsed;
	return is_icmp(p) && is_icmp_error(p) && parse_quoted(p, quoted) ? PARSED : PARSE_OTHER;
}

static __always_inline bool parse_icmp_error(struct packet *p, struct xdp_md *ctx, struct quoted *quoted)
{
	return parse_icmp(p, ctx, quoted) == PARSED;
}

/* The service that sent the quoted packet, or the source address of full NAT; 0 where it was neither. */
static __always_inline __u32 find_quoted(const struct packet *p, const struct quoted *quoted)
{
	struct address_entry *to = find_address(p, &p->destination);

	if (!to || !same_address(&quoted->source, &p->destination))
		return 0;
	return find_interval(to->services, port_key(quoted->protocol, quoted->ports & 0xffff));
}

int xdplb_icmp(struct xdp_md *ctx)
{
	struct packet packet = {}, *p = &packet;
	struct quoted quoted = {};
	struct service *service;
	__u32 target;

	switch (parse_icmp(p, ctx, &quoted)) {
	case PARSED:
		break;
	case PARSE_MALFORMED:
		return drop(0, REASON(malformed)); /* the first program did not look into IPv4 options */
	default:
		return pass_icmp(ctx);
	}
	target = find_quoted(p, &quoted);
	if (is_source(target))
		return continue_at(ctx, STAGE_FULL_NAT_ICMP_REPLY);
	service = services.lookup(&target);
	if (!target || !service)
		return pass_icmp(ctx);
	if (is_martian(p))
		return drop(target, REASON(martian_source));
	if (HAVE_FULL_NAT && service->forward == FORWARD_FULL_NAT)
		return continue_at(ctx, STAGE_FULL_NAT_ICMP);
	return icmp_to_backend(p, &quoted, service, target);
}

int xdplb_icmp_reply(struct xdp_md *ctx)
{
	struct packet packet = {}, *p = &packet;
	struct quoted quoted = {};

	if (!HAVE_NAT || !parse_icmp_error(p, ctx, &quoted))
		return pass_icmp(ctx);
	return icmp_to_client(p, &quoted);
}

int xdplb_tunnel_error(struct xdp_md *ctx)
{
	struct packet packet = {}, *p = &packet;

	return HAVE_TUNNELS && parse_network(p, ctx, true) == PARSED ? tunnel_error(p) : pass();
}

int xdplb_full_nat(struct xdp_md *ctx)
{
	struct packet packet = {}, *p = &packet;
	__u32 service = HAVE_FULL_NAT ? parse_full_nat(p, ctx) : 0;

	return service ? full_nat_to_backend(p, service) : verdict(XDP_ABORTED);
}

int xdplb_full_nat_reply(struct xdp_md *ctx)
{
	struct packet packet = {}, *p = &packet;
	__u32 target = HAVE_FULL_NAT ? parse_full_nat(p, ctx) : 0;

	return target ? full_nat_to_client(p, target & ~TARGET_SOURCE) : verdict(XDP_ABORTED);
}

int xdplb_full_nat_icmp(struct xdp_md *ctx)
{
	struct packet packet = {}, *p = &packet;
	struct quoted quoted = {};

	if (!HAVE_FULL_NAT || !parse_icmp_error(p, ctx, &quoted))
		return pass();
	return full_nat_error_to_backend(p, &quoted, find_quoted(p, &quoted));
}

int xdplb_full_nat_icmp_reply(struct xdp_md *ctx)
{
	struct packet packet = {}, *p = &packet;
	struct quoted quoted = {};

	if (!HAVE_FULL_NAT || !parse_icmp_error(p, ctx, &quoted))
		return pass();
	return full_nat_error_to_client(p, &quoted, find_quoted(p, &quoted) & ~TARGET_SOURCE);
}

int xdplb_nat_choose(struct xdp_md *ctx)
{
	struct packet packet = {}, *p = &packet;
	__u32 zero = 0;
	struct tail_call *call = tail_calls.lookup(&zero);

	if (!HAVE_NAT || !call || parse_network(p, ctx, true) != PARSED || parse_transport(p, true) != PARSED)
		return verdict(XDP_ABORTED);
	return choose_port(p, call);
}

int xdplb_nat_moved(struct xdp_md *ctx)
{
	struct packet packet = {}, *p = &packet;
	__u32 zero = 0;
	struct tail_call *call = tail_calls.lookup(&zero);

	if (!HAVE_NAT || !call || parse_network(p, ctx, true) != PARSED || parse_transport(p, true) != PARSED)
		return verdict(XDP_ABORTED);
	return move_to_backend(p, call);
}

int xdplb_nat_reply(struct xdp_md *ctx)
{
	struct packet packet = {}, *p = &packet;
	__u32 zero = 0;
	struct tail_call *call = tail_calls.lookup(&zero);

	if (!HAVE_NAT || !call || parse_network(p, ctx, true) != PARSED || parse_transport(p, true) != PARSED)
		return verdict(XDP_ABORTED);
	return reply_from(p, call->backend, call->port);
}

int xdplb_nat_read(struct xdp_md *ctx)
{
	struct packet packet = {}, *p = &packet;
	struct nat_reply from_backend;
	__u32 from;

	if (!HAVE_NAT || parse_network(p, ctx, true) != PARSED || parse_transport(p, true) != PARSED)
		return verdict(XDP_ABORTED);
	from = find_end(find_address(p, &p->source), p->protocol, source_port(p));
	if (!from)
		return pass_services(p);
	if (begins_connection(p)) {
		note_own_connection(p, from);
		return pass_services(p);
	}
	from_backend = read_reply(p, from);
	if (!from_backend.id)
		return pass_services(p);
	teach_fragments(p, from_backend.id, true);
	return continue_with(ctx, STAGE_NAT_REPLY, 0, from_backend.id, from_backend.moved);
}

int xdplb_schedule(struct xdp_md *ctx)
{
	__u32 zero = 0;
	struct choice *choice = choices.lookup(&zero);

	if (!HAVE_CHOICE || !choice)
		return verdict(XDP_ABORTED);
	choice->backend = choose(choice);
	return continue_at(ctx, choice->backend ? STAGE_FULL : STAGE_SCHEDULE);
}

int xdplb_by_kernel(struct xdp_md *ctx)
{
	struct packet packet = {}, *p = &packet;
	struct quoted quoted = {};
	struct tail_call *call;
	__u32 zero = 0;

	call = tail_calls.lookup(&zero);
	if (!call || parse_network(p, ctx, true) != PARSED)
		return verdict(XDP_ABORTED);
	if (is_icmp(p) ? !is_icmp_error(p) || !parse_quoted(p, &quoted) : parse_transport(p, true) != PARSED)
		return verdict(XDP_ABORTED);
	return by_kernel(p, &quoted, call->backend, call->port);
}

int xdplb_cut(struct xdp_md *ctx)
{
	struct packet packet = {}, *p = &packet;
	__u32 zero = 0;
	struct tail_call *call = tail_calls.lookup(&zero);

	if (!call || parse_network(p, ctx, true) != PARSED || parse_transport(p, true) != PARSED)
		return verdict(XDP_ABORTED);
	return fragment(p, call);
}

int xdplb_probe(struct xdp_md *ctx)
{
	struct packet packet = {}, *p = &packet;

	if (HAVE_TUNNELS && is_order(ctx))
		return cut_fragment(ctx);
	if (!HAVE_PROBES || parse_network(p, ctx, true) != PARSED || parse_transport(p, true) != PARSED)
		return XDP_DROP;
	return probe(p);
}

int xdplb_probe_reply(struct xdp_md *ctx)
{
	struct packet packet = {}, *p = &packet;

	if (!HAVE_PROBES || parse_network(p, ctx, true) != PARSED || parse_transport(p, true) != PARSED)
		return pass();
	return probe_reply(p);
}

int xdplb_untag(struct xdp_md *ctx)
{
	return untag(ctx);
}

int xdplb_sweep(struct xdp_md *ctx)
{
	sweep_set();
	return XDP_PASS;
}

int xdplb_forget(struct xdp_md *ctx)
{
	struct removal *removal = frame_start(ctx);

	if ((void *)(removal + 1) > frame_end(ctx))
		return XDP_ABORTED;
	forget_backend(removal);
	return XDP_PASS;
}

int xdplb_answer(struct xdp_md *ctx)
{
	struct packet packet = {}, *p = &packet;
	struct tail_call *call;
	__u32 zero = 0;
	bool tcp;

	call = tail_calls.lookup(&zero);
	if (!call || parse_network(p, ctx, true) != PARSED)
		return verdict(XDP_ABORTED);
	if (!answerable(p))
		return drop(call->service, REASON(unanswerable));
	if (call->kind == ANSWER_TOO_BIG) {
		if (!may_answer(TOTAL_TOO_BIG))
			return drop(call->service, REASON(answer_limited));
		count_reason(call->service, REASON(too_big));
		return answer_too_big(p, call->mtu);
	}
	tcp = p->protocol == IPPROTO_TCP && parse_transport(p, true) == PARSED;
	if (tcp && p->tcp_flags & TCP_RST)
		return drop(call->service, REASON(unanswerable));
	if (!(tcp ? may_answer(TOTAL_RESETS) : may_tell(&p->source)))
		return drop(call->service, REASON(answer_limited));
	count_reason(call->service, call->kind == ANSWER_IN_USE ? REASON(ports_in_use) : REASON(rejected));
	return tcp ? answer_reset(p) : answer_unreachable(p);
}

int xdplb_explain(struct xdp_md *ctx)
{
	struct packet packet = {}, *p = &packet;
	struct address_entry *to;
	struct trace *trace;
	__u32 zero = 0, id;

	trace = traces.lookup(&zero);
	if (!trace)
		return XDP_ABORTED;
	*trace = (struct trace){};
	if (parse_network(p, ctx, false) != PARSED || parse_transport(p, false) != PARSED)
		return XDP_PASS;
	to = find_address(p, &p->destination);
	if (to && to->services.count) {
		id = find_interval(to->services, port_key(p->protocol, destination_port(p)));
		trace->subject = id ? SUBJECT_TO_SERVICE : SUBJECT_OTHER_PORT;
		return id ? explain_balance(p, id, trace) : XDP_PASS;
	}
	id = HAVE_NAT ? find_end(find_address(p, &p->source), p->protocol, source_port(p)) : 0;
	return id ? explain_from_backend(p, id, trace) : XDP_PASS;
}
