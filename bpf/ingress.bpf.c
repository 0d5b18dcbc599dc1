// SPDX-License-Identifier: GPL-2.0-only
/*
 * tc ingress of every device that carries a network: a VLAN device, an access port, or the trunk that
 * carries many.
 *
 * A packet of a network is checked, gets the network's mark and is counted. TC_ACT_UNSPEC for what passes: the
 * filters of others still run. Packets of no network are left alone.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>

#include "abi.h"
#include "maps.h"
#include "skb.h"
#include "cursor.h"
#include "classify.h"
#include "ip.h"
#include "verdict.h"
#include "mark.h"
#include "counters.h"
#include "drops.h"

static __always_inline enum verdict decide(struct __sk_buff *skb, struct cursor *cursor, const struct frame *frame,
					   const struct network *network, struct ip_packet *packet)
{
	_Bool well_formed;

	if (!is_checked(network))
		return VERDICT_PASS;
	if (frame->ethertype == ETH_P_IP)
		well_formed = read_ipv4(cursor, packet_length(skb), packet_is_merged(skb), packet);
	else
		well_formed = read_ipv6(cursor, packet_length(skb), packet);
	return well_formed ? check(skb, cursor, network, packet) : VERDICT_MALFORMED;
}

/* A frame hides its tag behind more priority tags than anyone has use for; the kernel would find it. */
static __always_inline int guard(struct __sk_buff *skb)
{
	struct frame guarded = { .vlan_proto = VLAN_PROTO_GUARD };
	struct cursor cursor = { .packet = skb };
	struct ip_packet packet = {};

	if (!find_network(skb, &guarded))
		return TC_ACT_UNSPEC;
	count(skb, SLOT_NONE, VERDICT_MALFORMED);
	sample_drop(skb, SLOT_NONE, VERDICT_MALFORMED, &cursor, &packet);
	return TC_ACT_SHOT;
}

static __always_inline int ingress(struct __sk_buff *skb)
{
	struct cursor cursor = { .packet = skb };
	struct ip_packet packet = {};
	struct frame frame = {};
	enum frame_result result;
	struct network *network;
	enum verdict verdict;

	read_metadata_tag(skb, &frame);
	result = read_known_frame(skb, &cursor, &frame) ? FRAME_OK : read_frame(&cursor, &frame);
	if (result == FRAME_TOO_MANY_TAGS)
		return guard(skb);
	if (result != FRAME_OK || !is_ip(&frame))
		return TC_ACT_UNSPEC;
	network = find_network(skb, &frame);
	if (!network)
		return TC_ACT_UNSPEC;

	verdict = decide(skb, &cursor, &frame, network, &packet);
	count(skb, network->slot, verdict);
	if (verdict != VERDICT_PASS) {
		sample_drop(skb, network->slot, verdict, &cursor, &packet);
		return TC_ACT_SHOT;
	}
	if (network->fwmark)
		set_mark(skb, network->fwmark);
	return TC_ACT_UNSPEC;
}

int datapath_in(struct __sk_buff *skb)
{
	return ingress(skb);
}
