/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Keyed hashing. HASH_SEED and HASH_FACTOR (odd) are drawn from the secret hash key, so that nobody outside can choose flows
 * that land on one slot; it is not a cryptographic MAC and need not be one.
 *
 * A multiplication carries upwards only, so each is preceded and followed by a fold of the upper half onto the lower. A drawn
 * factor can be a poor one; the last multiplication, by the golden ratio, makes good for that.
 */
#ifndef XDPLB_HASH_H
#define XDPLB_HASH_H

#include "abi.h"

static __always_inline __u64 mix(__u64 hash, __u64 word)
{
	hash ^= word;
	hash ^= hash >> 32;
	hash *= HASH_FACTOR;
	return hash ^ (hash >> 32);
}

static __always_inline __u64 finish(__u64 hash)
{
	hash *= 0x9E3779B97F4A7C15ULL;
	return hash ^ (hash >> 32);
}

static __always_inline __u64 mix_address(const struct address *address)
{
	return mix(mix(HASH_SEED, address->hi), address->lo);
}

static __always_inline __u64 hash_address(const struct address *address)
{
	return finish(mix_address(address));
}

/* A client, as far as a flow's hash sees it. */
static __always_inline struct address client_of(const struct service *service, const struct address *source)
{
	if (!HAVE_CLIENT_PREFIX)
		return *source;
	return (struct address){ .hi = source->hi & service->client_mask.hi, .lo = source->lo & service->client_mask.lo };
}

/* `ports` as it stands in the frame of a packet from client to service. */
static __always_inline __u64 hash_flow(const struct service *service, const struct address *source, __u32 ports)
{
	const struct address client = client_of(service, source);

	return finish(mix(mix_address(&client), ports & service->ports_mask));
}

#endif
