/* SPDX-License-Identifier: GPL-2.0-only */
/* Which network a packet belongs to. */
#ifndef DATAPATH_CLASSIFY_H
#define DATAPATH_CLASSIFY_H

#include <linux/bpf.h>
#include <linux/if_ether.h>

#include "skb.h"
#include "cursor.h"
#include "maps.h"
#include "vlan.h"

/* The tag in the metadata, as the driver or the kernel left it there. */
static __always_inline void read_metadata_tag(struct __sk_buff *skb, struct frame *frame)
{
	if (!skb->vlan_present)
		return;
	frame->vlan_proto = BE16(skb->vlan_proto);
	frame->vlan_id = skb->vlan_tci & 0x0fff;
}

/* Other EtherTypes are not ours: ARP, and a second tag, whose packets belong to the inner device. */
static __always_inline _Bool is_ip(const struct frame *frame)
{
	return frame->ethertype == ETH_P_IP || frame->ethertype == ETH_P_IPV6;
}

/*
 * The usual frame is not looked at: the kernel has read its EtherType already, and goes by that. False: there may be a tag
 * in the packet, or it is short.
 */
static __always_inline _Bool read_known_frame(struct __sk_buff *skb, struct cursor *cursor, struct frame *frame)
{
	frame->ethertype = BE16(skb->protocol);
	if (!is_ip(frame))
		return 0;
	if (frame->vlan_id == 0)
		frame->vlan_proto = 0;
	cursor->offset = ETH_HLEN;
	return 1;
}

static __always_inline struct network *find_network(struct __sk_buff *skb, const struct frame *frame)
{
	struct network_key key = {
		.ifindex = skb->ifindex,
		.vlan_proto = frame->vlan_proto,
		.vlan_id = frame->vlan_id,
	};

	return dp_networks.lookup(&key);
}

#endif
