/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * May this packet enter? The first check that fails names the verdict.
 * datapath/observe/reference.py is the specification.
 */
#ifndef DATAPATH_VERDICT_H
#define DATAPATH_VERDICT_H

#include "abi.h"
#include "fib.h"
#include "ip.h"
#include "prefixes.h"
#include "scope.h"

static __always_inline _Bool is_checked(const struct network *network)
{
	return network->check_martians || network->source_check || network->vip_check || network->other_check;
}

static __always_inline enum verdict check_vip(struct __sk_buff *skb, const struct network *network,
					      const struct ip_packet *packet)
{
	if (network->vip_check == VIP_CHECK_OFF || is_feasible(network, packet))
		return VERDICT_PASS;
	if (network->vip_check == VIP_CHECK_FEASIBLE)
		return VERDICT_VIP_UNREACHABLE;
	return is_strictly_reachable(reverse_path(skb, network, packet)) ? VERDICT_PASS : VERDICT_VIP_STRICT;
}

static __always_inline enum verdict check_other(struct __sk_buff *skb, const struct network *network,
						const struct ip_packet *packet)
{
	enum reverse_path path;

	if (network->other_check == OTHER_CHECK_OFF)
		return VERDICT_PASS;
	path = reverse_path(skb, network, packet);
	if (network->other_check == OTHER_CHECK_LOOSE)
		return path == REVERSE_PATH_NONE ? VERDICT_RPF_LOOSE : VERDICT_PASS;
	return is_strictly_reachable(path) ? VERDICT_PASS : VERDICT_RPF_STRICT;
}

/* Only what would be dropped is asked for its ports. */
static __always_inline enum verdict check_reverse_path(struct __sk_buff *skb, const struct cursor *cursor,
						       const struct network *network,
						       const struct ip_packet *packet)
{
	enum verdict verdict;

	if (is_to_all_on_link(packet))
		return VERDICT_PASS;
	verdict = is_vip(network, packet) ? check_vip(skb, network, packet) : check_other(skb, network, packet);
	if (verdict != VERDICT_PASS && is_dhcp_answer(cursor, packet))
		return VERDICT_PASS;
	return verdict;
}

static __always_inline enum verdict check(struct __sk_buff *skb, const struct cursor *cursor,
					  const struct network *network, const struct ip_packet *packet)
{
	if (is_link_traffic(cursor, packet))
		return VERDICT_PASS;
	if (network->check_martians && is_martian(packet))
		return VERDICT_MARTIAN;
	if (network->source_check && is_spoofed(network, packet))
		return VERDICT_SPOOFED;
	if (!network->vip_check && !network->other_check)
		return VERDICT_PASS;
	return check_reverse_path(skb, cursor, network, packet);
}

#endif
