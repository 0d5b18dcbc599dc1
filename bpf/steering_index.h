/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Whose VIP is the source, and who is never steered: told without a look-up in a trie, for nearly every packet.
 * datapath/kernel/bpf/steering_index.py writes what is asked here, and has the same hash.
 */
#ifndef DATAPATH_STEERING_INDEX_H
#define DATAPATH_STEERING_INDEX_H

#include "steer.h"
#include "steering_maps.h"

/* The highest bits of a product are the best mixed: as many as count the buckets. */
#define INDEX_SHIFT (__builtin_clzll(INDEX_CAPACITY) + 1)

static __always_inline const struct steering_index *find_index(void)
{
	__u32 zero = 0;

	return dp_index.lookup(&zero);
}

static __always_inline __u64 first_half(const __be32 *address)
{
	__u64 half;

	__builtin_memcpy(&half, address, sizeof(half));
	return half;
}

static __always_inline const struct steered_network4 *find_network4(const struct steering_index *index,
								     const struct addresses4 *addresses)
{
	const __be32 masked = addresses->source & index->mask4;
	__u32 bucket = masked * index->multiplier4 >> INDEX_SHIFT;
	const struct indexed_network4 *indexed;

	if (index->state4 == INDEX_OFF)
		return search_network4(addresses);
	indexed = dp_index4.lookup(&bucket);
	if (!indexed)
		return 0;
	if (indexed->address == masked && indexed->network.ifindex)
		return &indexed->network;
	return indexed->ask_trie || index->state4 == INDEX_PART ? search_network4(addresses) : 0;
}

static __always_inline const struct steered_network6 *find_network6(const struct steering_index *index,
								     const struct addresses6 *addresses)
{
	const struct indexed_network6 *indexed;
	__be32 masked[4], differs = 0;
	__u32 bucket;
	int i;

	if (index->state6 == INDEX_OFF)
		return search_network6(addresses);
#pragma unroll
	for (i = 0; i < 4; i++)
		masked[i] = addresses->source[i] & index->mask6[i];
	bucket = (first_half(masked) * index->multiplier6 ^ first_half(masked + 2)) * index->multiplier6 >> INDEX_SHIFT;
	indexed = dp_index6.lookup(&bucket);
	if (!indexed)
		return 0;
#pragma unroll
	for (i = 0; i < 4; i++)
		differs |= indexed->address[i] ^ masked[i];
	if (!differs && indexed->network.ifindex)
		return &indexed->network;
	return indexed->ask_trie || index->state6 == INDEX_PART ? search_network6(addresses) : 0;
}

/* False: certainly none of slot 0. */
static __always_inline _Bool may_be_passed4(const struct steering_index *index, __be32 destination)
{
	int i;

	if (index->state4 == INDEX_OFF)
		return 1;
#pragma unroll
	for (i = 0; i < PASSED_FIRST; i++) {
		if ((destination & index->passed4[i].mask) == index->passed4[i].address)
			return 1;
	}
	return 0;
}

static __always_inline _Bool may_be_passed6(const struct steering_index *index, __u64 destination)
{
	int i;

	if (index->state6 == INDEX_OFF)
		return 1;
#pragma unroll
	for (i = 0; i < PASSED_FIRST; i++) {
		if ((destination & index->passed6[i].mask) == index->passed6[i].address)
			return 1;
	}
	return 0;
}

static __always_inline _Bool is_passed4(const struct steering_index *index, const struct addresses4 *addresses)
{
	return may_be_passed4(index, addresses->destination) && is_target4(SLOT_NONE, addresses);
}

static __always_inline _Bool is_passed6(const struct steering_index *index, const struct addresses6 *addresses)
{
	return may_be_passed6(index, first_half(addresses->destination)) && is_target6(SLOT_NONE, addresses);
}

#endif
