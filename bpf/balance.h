/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * From a packet to a service to its backend, or to the end of a packet that has none.
 *
 * Which backend a new flow gets: by hash, slots.h; by sequence or load, schedule.h. Which one an older flow has: flow.h. Which
 * backends take part, and with what share, is decided by the control plane (xdplb/core/weights.py).
 */
#ifndef XDPLB_BALANCE_H
#define XDPLB_BALANCE_H

#include "flow.h"
#include "forward.h"
#include "schedule.h"

/* What becomes of a packet to a service. A settled slot decides by itself; anything else is a matter of memory. */
static __always_inline struct decision decide(const struct packet *p, const struct service *service, __u32 service_id,
					      __u64 hash, const bool full)
{
	__u32 index = slot_index(service, hash), slot = read_slot(index), choice = 0, id;
	struct backend *backend = find_backend(slot, &id);
	struct decision decision;
	struct flow flow;

	if (!(slot & SLOT_IN_TRANSITION) && backend && backend->flags & BACKEND_UP)
		return decided_on(backend, id);
	flow = flow_of(p, service, service_id, hash);
	flow.chooses = HAVE_CHOICE && is_to_choose(&flow);
	if (full && flow.chooses)
		choice = take_choice(&flow);
	if (full && choice) {
		decision = follow_choice(&flow, choice);
		if (decision.outcome == OUTCOME_BACKEND)
			return decision;
		flow.chooses = false;
	}
	decision = recall(&flow, slot, index);
	if (HAVE_CHOICE && decision.outcome == OUTCOME_CHOOSE)
		open_choice(&flow);
	return decision;
}

/* What happens to a packet for which no backend was decided on. */
static __always_inline int without_backend(const struct packet *p, const struct service *service, __u32 service_id,
					   enum outcome outcome)
{
	if (HAVE_CHOICE && outcome == OUTCOME_CHOOSE)
		return continue_at(p->ctx, STAGE_SCHEDULE);
	if (outcome == OUTCOME_ORPHAN)
		return answer(p->ctx, ANSWER_REJECT, service_id, 0);
	return no_backend(p, service, service_id);
}

#endif
