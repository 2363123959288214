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

static __always_inline struct address_entry *find_address(const struct packet *p, const struct address *address)
{
	__u64 hash = hash_address(address);
	struct address_bucket *bucket;
	__u32 index, base;

	base = p->directory->half ? ADDRESS_BUCKETS : 0;
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

/* The bit that stands for an address in the set of those that services listen on. The upper bits depend on all of it. */
static __always_inline __u32 listening_bit(const struct address *address)
{
	return ((address->hi ^ address->lo) * HASH_FACTOR >> 32) * (64 * LISTENING_WORDS) >> 32;
}

/* Do services listen on the address? Asked of the source of nearly every packet, and the answer is no: a bit says that. */
static __always_inline bool is_listening(const struct packet *p, const struct address *address)
{
	const struct directory *current = p->directory;
	__u32 bit = listening_bit(address);
	struct address_entry *entry;

	if (!(current->listening[!!current->half][bit / 64] >> bit % 64 & 1))
		return false;
	entry = find_address(p, address);
	return entry && entry->services.count;
}

/*
 * Sources that no router forwards (RFC 1812 5.3.7, RFC 4291 2.5.6), and the services' own addresses: a backend would answer a
 * service, and that another backend, for ever. As in the kernel, 240/4 but its last address is like any other.
 */
static __always_inline bool is_martian(const struct packet *p)
{
	__u8 first = p->source.hi;

	if (p->version == 4) {
		first = unmapped(&p->source);
		if (first == 0 || first == 127 || (first >= 224 && (first < 240 || unmapped(&p->source) == 0xffffffff)))
			return true;
	} else if (first == 0xff || (p->source.hi & 0xc0ff) == 0x80fe || !(p->source.hi || p->source.lo & ~(1ULL << 56))) {
		return true; /* multicast, link-local, :: and ::1 */
	}
	return is_listening(p, &p->source);
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
