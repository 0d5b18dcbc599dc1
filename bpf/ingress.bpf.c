// SPDX-License-Identifier: GPL-2.0-only
/*
 * tc ingress of every device that carries a network: a VLAN device, an access port, or the trunk that
 * carries many.
 *
 * A packet of a network gets the network's mark and is counted. TC_ACT_UNSPEC: the filters of
 * others still run. Packets of no network are left alone.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>

#include "abi.h"
#include "maps.h"
#include "skb.h"
#include "cursor.h"
#include "classify.h"
#include "mark.h"
#include "counters.h"

static __always_inline int ingress(struct __sk_buff *skb)
{
	struct cursor cursor = { .packet = skb };
	struct frame frame = {};
	struct network *network;

	read_metadata_tag(skb, &frame);
	if (!read_frame(&cursor, &frame) || !is_ip(&frame))
		return TC_ACT_UNSPEC;
	network = find_network(skb, &frame);
	if (!network)
		return TC_ACT_UNSPEC;

	if (network->fwmark)
		set_mark(skb, network->fwmark);
	count(skb, network->slot, VERDICT_PASS);
	return TC_ACT_UNSPEC;
}

int datapath_in(struct __sk_buff *skb)
{
	return ingress(skb);
}
