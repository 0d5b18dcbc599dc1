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

#endif
