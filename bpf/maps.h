/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Every map. Names are at most 15 characters (BPF_OBJ_NAME_LEN): a later process finds them by name.
 * The capacities are compile-time constants of the generated prelude.
 */
#ifndef DATAPATH_MAPS_H
#define DATAPATH_MAPS_H

#include "abi.h"

BPF_TABLE("hash", struct network_key, struct network, dp_networks, NETWORKS_CAPACITY);

/* By slot. */
BPF_TABLE("percpu_array", __u32, struct network_counters, dp_counters, COUNTERS_CAPACITY);

/*
 * Totals of the programs that this one replaced; written by user space only. Adding them to
 * dp_counters there would race with packets, and a replacement would lose counts.
 */
BPF_TABLE("array", __u32, struct network_counters, dp_carried, COUNTERS_CAPACITY);

BPF_TABLE("array", __u32, struct program_meta, dp_meta, 1);

/* Tries take memory for what they hold only; PREFIXES_LIMIT is but an upper bound. */
#define PREFIXES_LIMIT (1 << 22)
#define TRIE(key, name) \
	BPF_F_TABLE("lpm_trie", struct key, struct prefix_value, name, PREFIXES_LIMIT, BPF_F_NO_PREALLOC)

/* Source rules of all networks, in slot 0. Among those of the networks each look-up would pass a node for each bit of a slot. */
TRIE(prefix4_key, dp_common4);
TRIE(prefix6_key, dp_common6);

/* Source rules by network. */
TRIE(prefix4_key, dp_sources4);
TRIE(prefix6_key, dp_sources6);

/* What is served on a network, but for its first prefix. */
TRIE(prefix4_key, dp_vips4);
TRIE(prefix6_key, dp_vips6);

/* What the network's own table can reach. */
TRIE(prefix4_key, dp_feasible4);
TRIE(prefix6_key, dp_feasible6);

BPF_TABLE("array", __u32, struct drop_control, dp_drop_control, 1);
BPF_TABLE("percpu_array", __u32, struct drop_window, dp_drop_window, 1);
BPF_RINGBUF_OUTPUT(dp_drops, DROP_BUFFER_PAGES);

#endif
