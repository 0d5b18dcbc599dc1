/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Longest-prefix questions: sources, VIPs, what a network's table can reach.
 *
 * One small function per trie pair: bcc rewrites map methods only where the map is named, so a map cannot be an
 * argument.
 */
#ifndef DATAPATH_PREFIXES_H
#define DATAPATH_PREFIXES_H

#include "ip.h"
#include "maps.h"

static __always_inline struct prefix4_key prefix4(__u32 slot, const __be32 *address)
{
	struct prefix4_key key = { .prefix_length = SLOT_BITS + 32, .slot = slot, .address = address[0] };

	return key;
}

static __always_inline struct prefix6_key prefix6(__u32 slot, const __be32 *address)
{
	struct prefix6_key key = { .prefix_length = SLOT_BITS + 128, .slot = slot };

	__builtin_memcpy(key.address, address, sizeof(key.address));
	return key;
}

static __always_inline const struct prefix_value *find_common_source(const struct ip_packet *packet)
{
	struct prefix4_key key4 = prefix4(SLOT_NONE, packet->source);
	struct prefix6_key key6 = prefix6(SLOT_NONE, packet->source);

	if (packet->version == 4)
		return dp_common4.lookup(&key4);
	return dp_common6.lookup(&key6);
}

static __always_inline const struct prefix_value *find_source(__u32 slot, const struct ip_packet *packet)
{
	struct prefix4_key key4 = prefix4(slot, packet->source);
	struct prefix6_key key6 = prefix6(slot, packet->source);

	if (packet->version == 4)
		return dp_sources4.lookup(&key4);
	return dp_sources6.lookup(&key6);
}

/* The longest match of the network's own rules and those of all; its own win a tie. No match: allowed. */
static __always_inline _Bool is_spoofed(const struct network *network, const struct ip_packet *packet)
{
	const struct prefix_value *common = find_common_source(packet);
	_Bool denied = common && common->action == SOURCE_DENY;
	const struct prefix_value *own;

	if (network->source_check == SOURCE_CHECK_COMMON || (network->source_check == SOURCE_CHECK_EXCEPT && !denied))
		return denied;
	own = find_source(network->slot, packet);
	if (own && (!common || own->length >= common->length))
		return own->action == SOURCE_DENY;
	return denied;
}

static __always_inline _Bool is_first_vip(const struct network *network, const struct ip_packet *packet)
{
	__be32 differs = 0;
	int i;

	if (packet->version == 4)
		return (packet->destination[0] & network->vip4_mask) == network->vip4;
#pragma unroll
	for (i = 0; i < 4; i++)
		differs |= (packet->destination[i] & network->vip6_mask[i]) ^ network->vip6[i];
	return !differs;
}

static __always_inline _Bool is_vip(const struct network *network, const struct ip_packet *packet)
{
	__u8 more = packet->version == 4 ? MORE_VIPS4 : MORE_VIPS6;
	struct prefix4_key key4 = prefix4(network->slot, packet->destination);
	struct prefix6_key key6 = prefix6(network->slot, packet->destination);

	if (is_first_vip(network, packet))
		return 1;
	if (!(network->more_vips & more))
		return 0;
	if (packet->version == 4)
		return dp_vips4.lookup(&key4) != 0;
	return dp_vips6.lookup(&key6) != 0;
}

static __always_inline _Bool is_feasible(const struct network *network, const struct ip_packet *packet)
{
	__u8 everywhere = packet->version == 4 ? FEASIBLE_EVERYWHERE4 : FEASIBLE_EVERYWHERE6;
	struct prefix4_key key4 = prefix4(network->slot, packet->source);
	struct prefix6_key key6 = prefix6(network->slot, packet->source);

	if (network->feasible_everywhere & everywhere)
		return 1;
	if (packet->version == 4)
		return dp_feasible4.lookup(&key4) != 0;
	return dp_feasible6.lookup(&key6) != 0;
}

#endif
