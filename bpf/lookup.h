/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Whose packet is it? From an address to what is known of it, and from there by port to a service or a NAT backend. */
#ifndef XDPLB_LOOKUP_H
#define XDPLB_LOOKUP_H

#include "hash.h"
#include "maps.h"
#include "parse.h"

/* 2^INTERVAL_STEPS intervals an address can be searched. */
#define INTERVAL_STEPS 17

static __always_inline bool same_address(const struct address *a, const struct address *b)
{
	return a->hi == b->hi && a->lo == b->lo;
}

static __always_inline struct address_entry *find_address(const struct address *address)
{
	__u32 zero = 0;
	struct directory *current = directory.lookup(&zero);
	__u64 hash = hash_address(address);
	struct address_bucket *bucket;
	__u32 index, base;

	if (!current)
		return NULL;
	base = current->half ? ADDRESS_BUCKETS : 0;
#pragma unroll
	for (int i = 0; i < 2; i++) {
		index = base + (hash & (ADDRESS_BUCKETS - 1));
		bucket = addresses.lookup(&index);
		if (!bucket)
			return NULL;
		if (same_address(&bucket->entry[0].address, address))
			return &bucket->entry[0];
		if (same_address(&bucket->entry[1].address, address))
			return &bucket->entry[1];
		hash >>= 32;
	}
	return NULL;
}

/* Binary search for the interval that holds `key`; its target, or 0. */
static __always_inline __u32 find_interval(struct interval_range range, __u32 key)
{
	__u32 first = range.first, count = range.count, middle;
	struct interval *interval;

	for (int i = 0; i < INTERVAL_STEPS && count; i++) {
		middle = first + count / 2;
		interval = intervals.lookup(&middle);
		if (!interval)
			return 0;
		if (key < interval->first) {
			count = count / 2;
		} else if (key > interval->last) {
			first = middle + 1;
			count -= count / 2 + 1;
		} else {
			return interval->target;
		}
	}
	return 0;
}

static __always_inline __u32 port_key(__u8 protocol, __be16 port)
{
	return (__u32)protocol << 16 | be16(port);
}

#endif
