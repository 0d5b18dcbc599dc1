// SPDX-License-Identifier: GPL-2.0-only
/*
 * tc egress of the devices that main's default routes leave by (`steering: direct`).
 *
 * At this hook destination NAT has been undone: a packet whose source is a VIP is an answer that this node gives for it,
 * whether it was forwarded from a pod, came back from another node, or was made here. It goes to the VIP's network,
 * to its gateway or straight to a client that is on the link there. Everything else passes.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/socket.h>

#include "abi.h"
#include "bytes.h"
#include "steering_maps.h"
#include "skb.h"
#include "steer.h"
#include "steering_index.h"

static __always_inline int steer4(struct __sk_buff *skb)
{
	const __u32 offset = ETH_HLEN + __builtin_offsetof(struct iphdr, saddr);
	const struct steering_index *index = find_index();
	const struct steered_network4 *network;
	struct addresses4 addresses;

	if (!index || packet_load_at(skb, offset, &addresses, sizeof(addresses)) != 0)
		return TC_ACT_UNSPEC;
	network = find_network4(index, &addresses);
	if (!network || network->ifindex == skb->ifindex || is_passed4(index, &addresses))
		return TC_ACT_UNSPEC;
	count_steered(skb, network->slot);
	return redirect4(skb, network, &addresses);
}

static __always_inline int steer6(struct __sk_buff *skb)
{
	const __u32 offset = ETH_HLEN + __builtin_offsetof(struct ipv6hdr, saddr);
	const struct steering_index *index = find_index();
	const struct steered_network6 *network;
	struct addresses6 addresses;

	if (!index || packet_load_at(skb, offset, &addresses, sizeof(addresses)) != 0)
		return TC_ACT_UNSPEC;
	network = find_network6(index, &addresses);
	if (!network || network->ifindex == skb->ifindex || is_passed6(index, &addresses))
		return TC_ACT_UNSPEC;
	count_steered(skb, network->slot);
	return redirect6(skb, network, &addresses);
}

/*
 * A tag in the metadata: the packet is on its way out of a VLAN device on top of this one, perhaps because we sent it
 * there.
 */
static __always_inline int steer(struct __sk_buff *skb)
{
	if (skb->vlan_present)
		return TC_ACT_UNSPEC;
	if (skb->protocol == BE16(ETH_P_IP))
		return steer4(skb);
	if (skb->protocol == BE16(ETH_P_IPV6))
		return steer6(skb);
	return TC_ACT_UNSPEC;
}

int datapath_out(struct __sk_buff *skb)
{
	return steer(skb);
}
