/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The fields of the XDP context, read by instructions that clang cannot merge, hoist or widen: it would compute with the
 * context's pointer or with the end of the frame, and the verifier allows neither.
 */
#ifndef XDPLB_FRAME_H
#define XDPLB_FRAME_H

#include "wire.h"

#define CONTEXT_FIELD(ctx, field)                                                                                              \
	({                                                                                                                     \
		void *value;                                                                                                   \
		asm volatile("%0 = *(u32 *)(%1 + %2)"                                                                          \
			     : "=r"(value)                                                                                     \
			     : "r"(ctx), "i"(__builtin_offsetof(struct xdp_md, field)));                                       \
		value;                                                                                                         \
	})

static __always_inline void *frame_start(struct xdp_md *ctx)
{
	return CONTEXT_FIELD(ctx, data);
}

static __always_inline void *frame_end(struct xdp_md *ctx)
{
	return CONTEXT_FIELD(ctx, data_end);
}

static __always_inline __u32 ingress(struct xdp_md *ctx)
{
	return (__u64)CONTEXT_FIELD(ctx, ingress_ifindex);
}

#endif
