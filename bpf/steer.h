/* SPDX-License-Identifier: GPL-2.0-only */
/* Whose VIP is the source, who is beside the way, and how a packet leaves by another device than it was routed to. */
#ifndef DATAPATH_STEER_H
#define DATAPATH_STEER_H

#include <linux/bpf.h>

#include "skb.h"
#include "steering_maps.h"

#define AF_INET_NUMBER 2
#define AF_INET6_NUMBER 10

/* As they lie in the headers. */
struct addresses4 {
	__be32 source;
	__be32 destination;
};

struct addresses6 {
	__be32 source[4];
	__be32 destination[4];
};

#ifndef REDIRECT_NEIGH
/* bcc 0.26 declares it with three arguments. */
static long (*const redirect_neigh)(__u32 ifindex, struct bpf_redir_neigh *next_hop, int size, __u64 flags) =
	(void *)BPF_FUNC_redirect_neigh;
/* A test puts something in its place that can be looked at. */
#define REDIRECT_NEIGH redirect_neigh
#endif

static __always_inline struct steered_network4 *search_network4(const struct addresses4 *addresses)
{
	struct vip4_key key = { .prefix_length = 32, .address = addresses->source };

	return dp_replies4.lookup(&key);
}

static __always_inline struct steered_network6 *search_network6(const struct addresses6 *addresses)
{
	struct vip6_key key = { .prefix_length = 128 };

	__builtin_memcpy(key.address, addresses->source, sizeof(key.address));
	return dp_replies6.lookup(&key);
}

/* Slot 0: destinations that are never steered. Of a network: those on its link, but for its first prefix. */
static __always_inline _Bool is_target4(__u32 slot, const struct addresses4 *addresses)
{
	struct prefix4_key key = {
		.prefix_length = SLOT_BITS + 32,
		.slot = slot,
		.address = addresses->destination,
	};

	return dp_targets4.lookup(&key) != 0;
}

static __always_inline _Bool is_target6(__u32 slot, const struct addresses6 *addresses)
{
	struct prefix6_key key = { .prefix_length = SLOT_BITS + 128, .slot = slot };

	__builtin_memcpy(key.address, addresses->destination, sizeof(key.address));
	return dp_targets6.lookup(&key) != 0;
}

static __always_inline _Bool is_on_link4(const struct steered_network4 *network, const struct addresses4 *addresses)
{
	if (!((addresses->destination ^ network->link) & network->link_mask))
		return 1;
	return network->more_links && is_target4(network->slot, addresses);
}

static __always_inline _Bool is_on_link6(const struct steered_network6 *network, const struct addresses6 *addresses)
{
	__be32 differs = 0;
	int i;

#pragma unroll
	for (i = 0; i < 4; i++)
		differs |= (addresses->destination[i] ^ network->link[i]) & network->link_mask[i];
	if (!differs)
		return 1;
	return network->more_links && is_target6(network->slot, addresses);
}

/*
 * Takes away the route that main gave the packet. While the next hop is not resolved the packet waits for that, and then
 * the kernel asks the packet's route for the neighbour once more (neigh_update): it would leave by the right device
 * with the MAC address of main's gateway. Seen on 6.18. There is no helper that only drops a route; the metadata route
 * that this one puts in its place answers such questions with nothing (since 5.13), and only a tunnel device in
 * external mode would read it. The oldest layout of the key, which every kernel takes.
 */
static __always_inline void drop_route(struct __sk_buff *skb)
{
	struct bpf_tunnel_key key = {};

	bpf_skb_set_tunnel_key(skb, &key, __builtin_offsetof(struct bpf_tunnel_key, remote_ipv6[1]), 0);
}

/*
 * The next hop is always given: without it the helper asks the main table for a route by that device, which has none.
 * TTL and hop limit stay: a forwarded packet was routed once already.
 */
static __always_inline int redirect4(struct __sk_buff *skb, const struct steered_network4 *network, const struct addresses4 *addresses)
{
	struct bpf_redir_neigh next_hop = { .nh_family = AF_INET_NUMBER, .ipv4_nh = network->gateway };

	drop_route(skb);
	if (is_on_link4(network, addresses))
		next_hop.ipv4_nh = addresses->destination;
	return REDIRECT_NEIGH(network->ifindex, &next_hop, sizeof(next_hop), 0);
}

static __always_inline int redirect6(struct __sk_buff *skb, const struct steered_network6 *network, const struct addresses6 *addresses)
{
	struct bpf_redir_neigh next_hop = { .nh_family = AF_INET6_NUMBER };

	drop_route(skb);
	if (is_on_link6(network, addresses))
		__builtin_memcpy(next_hop.ipv6_nh, addresses->destination, sizeof(next_hop.ipv6_nh));
	else
		__builtin_memcpy(next_hop.ipv6_nh, network->gateway, sizeof(next_hop.ipv6_nh));
	return REDIRECT_NEIGH(network->ifindex, &next_hop, sizeof(next_hop), 0);
}

/* Per CPU. tc egress runs with bottom halves off: nothing that counts here comes in between. */
static __always_inline void count_steered(struct __sk_buff *skb, __u32 slot)
{
	struct counter *counter = dp_steered.lookup(&slot);

	if (!counter)
		return;
	counter->packets += packet_segments(skb);
	counter->bytes += skb->len;
}

#endif
