/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * For comparison, in the bench only: the conventional design, which remembers every flow in a BPF LRU hash in front of the slot
 * table. All else is xdplb's own code on xdplb's own maps.
 */
#include "abi.h"
#include "maps.h"
#include "frame.h"
#include "hash.h"
#include "csum.h"
#include "count.h"
#include "parse.h"
#include "lookup.h"
#include "slots.h"
#include "rewrite.h"
#include "encap.h"
#include "forward.h"

struct flow_key {
	struct address source;
	struct address destination;
	__u32 ports;
	__u32 protocol;
};

struct remembered {
	__u32 backend;
	__u32 pad;
};

BPF_TABLE("lru_hash", struct flow_key, struct remembered, flows, CONVENTIONAL_FLOWS);

static __always_inline struct backend *recall_flow(const struct packet *p, const struct service *service, __u64 hash, __u32 *id)
{
	struct flow_key key = {};
	struct backend *backend;
	struct remembered *known, fresh = {};

	key.source = p->source;
	key.destination = p->destination;
	key.ports = p->ports;
	key.protocol = p->protocol;
	known = flows.lookup(&key);
	if (known && !(p->tcp_flags & TCP_SYN)) {
		*id = known->backend;
		return backends.lookup(id);
	}
	backend = backend_by_hash(service, hash, id);
	fresh.backend = *id;
	if (backend)
		flows.update(&key, &fresh);
	return backend;
}

int conventional(struct xdp_md *ctx)
{
	struct packet packet = {}, *p = &packet;
	struct address_entry *to;
	struct service *service;
	struct backend *backend;
	__u32 id;
	__u64 hash;

	if (parse_network(p, ctx, false) != PARSED)
		return pass();
	to = find_address(p, &p->destination);
	if (!to || parse_transport(p, false) != PARSED)
		return pass();
	id = find_interval(to->services, port_key(p->protocol, destination_port(p)));
	service = services.lookup(&id);
	if (!id || !service)
		return pass();
	hash = hash_flow(service, &p->source, p->ports);
	backend = recall_flow(p, service, hash, &id);
	if (!backend)
		return pass();
	return forward(p, service, backend, id, hash);
}
