/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef DATAPATH_COUNTERS_H
#define DATAPATH_COUNTERS_H

#include "maps.h"
#include "skb.h"

/*
 * Per CPU, so plain additions do. They can be lost only where a packet interrupts another one on the same CPU
 * between load and store, which tc ingress (softirq) does not do to itself.
 */
static __always_inline void count(struct __sk_buff *skb, __u32 slot, enum verdict verdict)
{
	struct network_counters *counters = dp_counters.lookup(&slot);

	if (!counters || verdict >= VERDICT_COUNT)
		return;
	counters->verdicts[verdict].packets += packet_segments(skb);
	counters->verdicts[verdict].bytes += skb->len;
}

#endif
