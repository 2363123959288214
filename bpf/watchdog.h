/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* `on_control_loss: pass`: without a daemon that shows itself alive, packets are the kernel's. */
#ifndef XDPLB_WATCHDOG_H
#define XDPLB_WATCHDOG_H

#include "flow.h"
#include "maps.h"

/* Ticks come round: what counts is the sign of their difference. */
static __always_inline bool control_is_lost(void)
{
	__u32 zero = 0;
	struct directory *current = directory.lookup(&zero);

	return current && (__s32)(current_tick() - current->alive_until) > 0;
}

#endif
