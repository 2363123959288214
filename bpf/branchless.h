/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Comparisons without a branch: with eight ways of a set and a branch for each, or one for each kind of header, the verifier
 * would follow every combination. The barriers, before the shift and after, keep clang from seeing what is meant, and from
 * putting the branches back. What follows multiplies by the result: the verifier of Linux 6.18 knows masks, and makes branches
 * of them.
 */
#ifndef XDPLB_BRANCHLESS_H
#define XDPLB_BRANCHLESS_H

#include "wire.h"

static __always_inline __u64 sign_bit(__u64 x)
{
	asm volatile("" : "+r"(x));
	x >>= 63;
	asm volatile("" : "+r"(x));
	return x;
}

static __always_inline __u64 is_zero(__u64 x)
{
	return sign_bit(~(x | -x));
}

/* For numbers below 2^63, as below. */
static __always_inline __u64 is_less(__u64 a, __u64 b)
{
	return sign_bit(a - b);
}

/* `yes` where `bit` is 1, `no` where it is 0. */
static __always_inline __u64 either(__u64 bit, __u64 yes, __u64 no)
{
	return no + (yes - no) * bit;
}

static __always_inline __u64 larger(__u64 a, __u64 b)
{
	return either(is_less(a, b), b, a);
}

/* The place of the lowest bit that is set, of eight; 8 where none is. A single bit that is at least 2^n carries from 256 - 2^n.
 */
static __always_inline __u64 lowest_bit(__u64 bits)
{
	bits &= -bits;
	return ((bits + 0xff) >> 8 ^ 1) << 3 | ((bits & 0xf0) + 0xf0) >> 8 << 2 | ((bits & 0xcc) + 0xfc) >> 8 << 1 |
	       ((bits & 0xaa) + 0xfe) >> 8;
}

#endif
