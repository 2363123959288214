/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From a packet to a service to its backend, or to the end of a packet that has none. */
#ifndef XDPLB_BALANCE_H
#define XDPLB_BALANCE_H

#include "flow.h"
#include "forward.h"
#include "schedule.h"

/* The backend of a packet to a service. A settled slot answers by itself; anything else is a matter of memory. */
static __always_inline struct backend *find_flow_backend(const struct packet *p, const struct service *service,
							 __u32 service_id, __u64 hash, __u32 *id, const bool full)
{
	__u32 index = slot_index(service, hash), slot = read_slot(index);
	struct backend *backend = find_backend(slot, id);
	__u32 choice = 0;
	struct flow flow;

	if (!(slot & SLOT_IN_TRANSITION) && backend && backend->flags & BACKEND_UP)
		return backend;
	flow = flow_of(p, service, service_id, hash);
	flow.chooses = HAVE_CHOICE && is_to_choose(&flow);
	if (full && flow.chooses)
		choice = take_choice(&flow);
	if (full && choice) {
		backend = follow_choice(&flow, choice, id);
		if (backend)
			return backend;
		flow.chooses = false;
	}
	backend = recall(&flow, slot, index, id);
	if (HAVE_CHOICE && !backend && *id == CHOICE_OPEN)
		open_choice(&flow);
	return backend;
}

/* The end of a packet that has no backend: not yet, not any more, or not at all. */
static __always_inline int without_backend(const struct packet *p, const struct service *service, __u32 service_id, __u32 id)
{
	if (HAVE_CHOICE && id == CHOICE_OPEN)
		return continue_at(p->ctx, STAGE_SCHEDULE);
	if (id == BACKEND_GONE)
		return answer(p->ctx, ANSWER_REJECT, service_id, 0);
	return no_backend(p, service, service_id);
}

#endif
