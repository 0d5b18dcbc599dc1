/* SPDX-License-Identifier: GPL-2.0-only */
/* Every map of the egress program. Names are at most 15 characters (BPF_OBJ_NAME_LEN). */
#ifndef DATAPATH_STEERING_MAPS_H
#define DATAPATH_STEERING_MAPS_H

#include "abi.h"

/* Tries take memory for what they hold only; STEERING_LIMIT is but an upper bound. */
#define STEERING_LIMIT (1 << 22)
#define STEERING_TRIE(key, value, name) \
	BPF_F_TABLE("lpm_trie", struct key, struct value, name, STEERING_LIMIT, BPF_F_NO_PREALLOC)

/* By VIP: where the answers that carry it go. */
STEERING_TRIE(vip4_key, steered_network4, dp_replies4);
STEERING_TRIE(vip6_key, steered_network6, dp_replies6);

/* Destinations on the link of a network; in slot 0 those that are left alone. */
STEERING_TRIE(prefix4_key, prefix_value, dp_targets4);
STEERING_TRIE(prefix6_key, prefix_value, dp_targets6);

/* Arrays: the kernel needs no call to look into them. Sparse, so that hardly any two VIPs share a bucket. */
#define INDEX_CAPACITY (4 * COUNTERS_CAPACITY)
BPF_TABLE("array", __u32, struct indexed_network4, dp_index4, INDEX_CAPACITY);
BPF_TABLE("array", __u32, struct indexed_network6, dp_index6, INDEX_CAPACITY);
BPF_TABLE("array", __u32, struct steering_index, dp_index, 1);

/* By slot. */
BPF_TABLE("percpu_array", __u32, struct counter, dp_steered, COUNTERS_CAPACITY);

/* Totals of the programs that this one replaced; see dp_carried. */
BPF_TABLE("array", __u32, struct counter, dp_steered_was, COUNTERS_CAPACITY);

BPF_TABLE("array", __u32, struct program_meta, dp_meta, 1);

#endif
