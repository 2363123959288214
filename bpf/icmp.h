/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * ICMP errors about a flow. They quote the packet that could not be delivered, down to the first 8 bytes of its transport
 * header (RFC 792), and must reach whoever sent it: a backend, for errors that come to a service's address; a client, for
 * errors about packets to a NAT backend. NAT has to be done in the quotation as well, or the host would not know the flow.
 */
#ifndef XDPLB_ICMP_H
#define XDPLB_ICMP_H

#include "forward.h"
#include "fragment.h"
#include "lookup.h"
#include "nat.h"
#include "slots.h"
#include "flow.h"

#define MAX_QUOTED_EXTENSIONS 3

/* The packet that an error quotes. */
struct quoted {
	void *network;
	void *transport;
	struct address source;
	struct address destination;
	__u32 ports; /* source and destination, as quoted */
	__u8 protocol;
};

static __always_inline bool is_icmp_error(const struct packet *p)
{
	struct icmphdr *icmp = p->transport;

	if ((void *)(icmp + 1) > p->end || p->fragment != WHOLE)
		return false;
	if (p->version == 6)
		return icmp->type >= 1 && icmp->type <= 4; /* unreachable, too big, time exceeded, parameter problem */
	return icmp->type == 3 || icmp->type == 4 || icmp->type == 11 || icmp->type == 12;
}

/* Is a field of the quotation part of the packet? Behind that stands whatever the link layer padded the frame with. */
static __always_inline bool quoted_to(const struct packet *p, const void *field_end)
{
	__u32 length = field_end - p->network;

	return field_end <= p->end && length <= p->length;
}

static __always_inline bool parse_quoted_ipv4(const struct packet *p, struct quoted *q)
{
	struct ipv4hdr *ip = q->network;
	__u32 header_length;

	if ((void *)(ip + 1) > p->end || ip->version_ihl >> 4 != 4 || ip->fragment & be16(IP_OFFSET))
		return false;
	header_length = (ip->version_ihl & 0x0f) * 4;
	if (header_length < sizeof(*ip))
		return false;
	q->source = mapped(ip->source);
	q->destination = mapped(ip->destination);
	q->protocol = ip->protocol;
	q->transport = q->network + header_length;
	return true;
}

static __always_inline bool parse_quoted_ipv6(const struct packet *p, struct quoted *q)
{
	struct ipv6hdr *ip = q->network;
	struct ipv6_extension *extension;
	__u64 cut;

	if ((void *)(ip + 1) > p->end || *(__u8 *)ip >> 4 != 6)
		return false;
	q->source = (struct address){ .hi = ip->source[0], .lo = ip->source[1] };
	q->destination = (struct address){ .hi = ip->destination[0], .lo = ip->destination[1] };
	q->protocol = ip->next_header;
	q->transport = ip + 1;
#pragma unroll
	for (int i = 0; i < MAX_QUOTED_EXTENSIONS; i++) {
		extension = q->transport;
		asm volatile("" : "+r"(extension)); /* keep the check and the access on one register, for the verifier */
		if (q->protocol != IPPROTO_HOPOPTS && q->protocol != IPPROTO_ROUTING && q->protocol != IPPROTO_DSTOPTS &&
		    q->protocol != IPPROTO_FRAGMENT)
			return true;
		if ((void *)(extension + 1) > p->end)
			return false;
		cut = is_zero(q->protocol ^ IPPROTO_FRAGMENT);
		if (cut * (((struct ipv6_fragment *)extension)->offset & be16(IP6_OFFSET)))
			return false;
		q->transport += extension_length(extension, cut);
		q->protocol = extension->next_header;
	}
	return true;
}

static __always_inline bool parse_quoted_network(const struct packet *p, struct quoted *q)
{
	q->network = p->transport + sizeof(struct icmphdr);
	return p->version == 4 ? parse_quoted_ipv4(p, q) : parse_quoted_ipv6(p, q);
}

static __always_inline bool parse_quoted(const struct packet *p, struct quoted *q)
{
	if (!parse_quoted_network(p, q))
		return false;
	if ((q->protocol != IPPROTO_TCP && q->protocol != IPPROTO_UDP) || !quoted_to(p, q->transport + 8))
		return false;
	q->ports = *(__u32 *)q->transport;
	return true;
}

/* What is about no flow of a service may be about a tunnel's packet. */
static __always_inline int pass_icmp(struct xdp_md *ctx)
{
	return HAVE_TUNNELS ? continue_at(ctx, STAGE_TUNNEL_ERROR) : pass();
}

/* Replaces a 16-bit field of the quotation; returns what the ICMP checksum must learn of it. */
static __always_inline __u64 quote_field(__u16 *field, __u16 new)
{
	__u64 sum = csum_change16(0, *field, new);

	*field = new;
	return sum;
}

/* The quoted transport's own checksum, where the quotation is long enough to have it. */
static __always_inline __u64 quote_checksum(const struct packet *p, const struct quoted *q, __u64 sum)
{
	struct tcphdr *tcp = q->transport;
	struct udphdr *udp = q->transport;

	if (q->protocol == IPPROTO_UDP) {
		if ((void *)(udp + 1) <= p->end && udp->check)
			return quote_field(&udp->check, csum_apply_udp(udp->check, sum));
	} else if (quoted_to(p, &tcp->check + 1)) {
		return quote_field(&tcp->check, csum_apply(tcp->check, sum));
	}
	return 0;
}

/* NAT inside the quotation: its source (or destination) and that side's port. Returns the change of the ICMP checksum. */
static __always_inline __u64 translate_quoted(struct packet *p, struct quoted *q, const struct address *new, __be16 port,
					      const bool is_source)
{
	const struct address *old = is_source ? &q->source : &q->destination;
	struct ipv4hdr *ip4 = q->network;
	struct ipv6hdr *ip6 = q->network;
	__u16 *ports = q->transport;
	__u64 sum = csum_change_address(0, old, new), icmp = sum;

	if (p->version == 4) {
		if ((void *)(ip4 + 1) > p->end)
			return 0;
		if (is_source)
			ip4->source = unmapped(new);
		else
			ip4->destination = unmapped(new);
		icmp += quote_field(&ip4->check, csum_apply(ip4->check, sum));
	} else {
		/* Or clang merges both families' checks into one that the verifier cannot follow. */
		asm volatile("" : "+r"(ip6));
		if ((void *)(ip6 + 1) > p->end)
			return 0;
		(is_source ? ip6->source : ip6->destination)[0] = new->hi;
		(is_source ? ip6->source : ip6->destination)[1] = new->lo;
	}
	if ((void *)(ports + 4) > p->end)
		return 0;
	if (port) {
		sum = csum_change16(sum, ports[!is_source], port);
		icmp += quote_field(&ports[!is_source], port);
	}
	return icmp + quote_checksum(p, q, sum);
}

/* The same for a port alone; 0 leaves it. */
static __always_inline __u64 translate_quoted_port(struct packet *p, struct quoted *q, __be16 port, const bool is_source)
{
	__u16 *ports = q->transport;
	__u64 sum, icmp;

	if (!port || (void *)(ports + 4) > p->end)
		return 0;
	sum = csum_change16(0, ports[!is_source], port);
	icmp = quote_field(&ports[!is_source], port);
	return icmp + quote_checksum(p, q, sum);
}

/* The error's own address. ICMPv6's checksum covers it, ICMP's does not. */
static __always_inline __u64 replace_outer(struct packet *p, const struct address *new, const bool is_source)
{
	__u64 sum = replace_address(p, new, is_source);

	return p->version == 4 ? 0 : sum;
}

static __always_inline void patch_icmp(struct packet *p, __u64 sum)
{
	struct icmphdr *icmp = p->transport;

	if ((void *)(icmp + 1) <= p->end)
		icmp->check = csum_apply(icmp->check, sum);
}

/* The client's port as the NAT backend of the quoted packet sees it; 0 where that is the client's own. */
static __always_inline __be16 port_at_backend(const struct quoted *q, const struct backend *backend, __u32 id)
{
	__be16 port = backend->port ? backend->port : q->ports & 0xffff, other;
	__u64 pair;

	if (!is_remembered(backend, id))
		return 0;
	pair = nat_pair(&q->destination, &backend->address);
	other = other_port(pair, q->ports >> 16);
	if (NAT_OWNER(nat_tuple(pair, q->ports >> 16, port, q->protocol).word) == nat_owner(id, false))
		return 0;
	return NAT_OWNER(nat_tuple(pair, other, port, q->protocol).word) == nat_owner(id, true) ? other : 0;
}

/* An error to a service's address becomes one to its backend. */
static __always_inline void translate_error(struct packet *p, struct quoted *q, const struct backend *backend, __u32 id)
{
	__u64 sum = translate_quoted_port(p, q, port_at_backend(q, backend, id), false);

	sum += translate_quoted(p, q, &backend->address, backend->port, true);
	patch_icmp(p, sum + replace_outer(p, &backend->address, false));
}

/* An error that a router or the client sent to a service's address, about a packet of the service's backend. */
static __always_inline int icmp_to_backend(struct packet *p, struct quoted *q, struct service *service, __u32 service_id)
{
	__u32 ports, index, id;
	struct flow flow = {};
	struct backend *backend;
	int action;
	__u64 hash;

	ports = q->ports >> 16 | q->ports << 16; /* as the client sends them */
	hash = hash_flow(service, &q->destination, ports);
	flow.service = service;
	flow.service_id = service_id;
	flow.hash = hash;
	flow.key = flow_key(service, service_id, hash, ports);
	flow.tick = current_tick();
	index = slot_index(service, hash);
	backend = look_up_flow(&flow, read_slot(index), index, &id);
	if (!backend)
		return drop(service_id, REASON(no_backend));
	if (!admit(p, service, backend, id, &action))
		return action;
	if (HAVE_NAT && service->forward == FORWARD_NAT)
		translate_error(p, q, backend, id);
	return emit(p, service, backend, hash);
}

/* An error about a packet that a client's flow sent to a NAT backend, on its way to the client. */
static __always_inline int icmp_to_client(struct packet *p, struct quoted *q)
{
	struct address_entry *about = find_address(p, &q->destination);
	struct bpf_fib_lookup fib = {};
	struct nat_reply reply;
	struct backend *backend;
	__u32 named;
	struct service *service;
	bool from_backend;
	enum route route;
	__u64 sum;

	named = find_end(about, q->protocol, q->ports >> 16);
	if (!named || !same_address(&q->source, &p->destination))
		return pass_icmp(p->ctx);
	reply = find_reply(named, &q->destination, q->ports >> 16, &q->source, q->ports & 0xffff, q->protocol);
	backend = backends.lookup(&reply.id);
	service = backend ? services.lookup(&backend->service) : NULL;
	if (!reply.id || !service || !service->slot_mask || hops_used_up(p))
		return pass();
	from_backend = same_address(&p->source, &q->destination);
	route = find_route(p, from_backend ? &service->address : &p->source, &p->destination, &fib);
	if (route >= ROUTE_KERNEL_UNTOUCHED)
		return pass();
	count_reply(reply.id, p->length);
	sum = translate_quoted_port(p, q, reply.moved, true);
	sum += translate_quoted(p, q, &service->address, backend->port ? service->port : 0, false);
	if (from_backend)
		sum += replace_outer(p, &service->address, true);
	patch_icmp(p, sum);
	if (route == ROUTE_KERNEL)
		return pass();
	take_hop(p);
	return send_route(p, &fib);
}

#endif
