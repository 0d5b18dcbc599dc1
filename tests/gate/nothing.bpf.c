// SPDX-License-Identifier: GPL-2.0-only
/* What a run of the shortest program costs. */
#include <linux/bpf.h>

#include "abi.h"

int nothing(struct __sk_buff *skb)
{
	return -1; /* TC_ACT_UNSPEC */
}
