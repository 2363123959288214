/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The Internet checksum, updated incrementally (RFC 1624, equation 3). Sums are of 16-bit words as loaded from the wire. */
#ifndef XDPLB_CSUM_H
#define XDPLB_CSUM_H

#include "abi.h"

static __always_inline __u64 csum_add32(__u64 sum, __u32 word)
{
	return sum + (word & 0xffff) + (word >> 16);
}

/* `sum` after one word was replaced by another. */
static __always_inline __u64 csum_change32(__u64 sum, __u32 old, __u32 new)
{
	return csum_add32(csum_add32(sum, ~old), new);
}

static __always_inline __u64 csum_change16(__u64 sum, __u16 old, __u16 new)
{
	return sum + (__u16)~old + new;
}

static __always_inline __u64 csum_change_address(__u64 sum, const struct address *old, const struct address *new)
{
	sum = csum_change32(sum, old->hi, new->hi);
	sum = csum_change32(sum, old->hi >> 32, new->hi >> 32);
	sum = csum_change32(sum, old->lo, new->lo);
	return csum_change32(sum, old->lo >> 32, new->lo >> 32);
}

/* For sums of fewer than 2^16 words: two additions take the carries in. */
static __always_inline __u16 csum_fold(__u64 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return sum + (sum >> 16);
}

/* The checksum field after the changes that `sum` gathered. */
static __always_inline __u16 csum_apply(__u16 check, __u64 sum)
{
	return ~csum_fold((__u16)~check + sum);
}

/* UDP's 0 means "no checksum": one that comes out as 0 is sent as 0xffff (RFC 768). */
static __always_inline __u16 csum_apply_udp(__u16 check, __u64 sum)
{
	check = csum_apply(check, sum);
	return check ? check : 0xffff;
}

#endif
