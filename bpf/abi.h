/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What C and Python share: constants and the layout of map keys and values.
 *
 * datapath/kernel/bpf/abi.py describes the same from Python's side and appends a static assertion for each
 * constant, size and offset to every text that is compiled, so a difference cannot be loaded.
 * Plain C: it also compiles natively.
 */
#ifndef DATAPATH_ABI_H
#define DATAPATH_ABI_H

#include <linux/types.h>

/* To be raised with every change of this file: a running program of another version is replaced, never updated. */
#define ABI_VERSION 1

/* Slot 0 belongs to no network. */
#define SLOT_NONE 0

/* What becomes of a packet. The names are those of the counters; Python has the same list. */
enum verdict {
	VERDICT_PASS,
	VERDICT_MALFORMED,
	VERDICT_MARTIAN,
	VERDICT_SPOOFED,
	VERDICT_VIP_UNREACHABLE,
	VERDICT_VIP_STRICT,
	VERDICT_RPF_STRICT,
	VERDICT_RPF_LOOSE,
	VERDICT_COUNT,
};

enum vip_check {
	VIP_CHECK_OFF,
	VIP_CHECK_FEASIBLE,
	VIP_CHECK_STRICT,
};

enum other_check {
	OTHER_CHECK_OFF,
	OTHER_CHECK_LOOSE,
	OTHER_CHECK_STRICT,
};

/* Where a network's packets are first seen. */
struct network_key {
	__u32 ifindex;
	__u16 vlan_proto; /* host order; 0 without a tag */
	__u16 vlan_id;
};

struct network {
	__u32 fwmark;         /* 0: leave the mark alone */
	__u32 device_ifindex; /* where the IP stack sees the packet: not the trunk */
	__u16 slot;
	__u8 vip_check;
	__u8 other_check;
	__u8 check_martians;
	__u8 check_sources;
	__u8 reserved[2];
};

struct counter {
	__u64 packets;
	__u64 bytes;
};

struct network_counters {
	struct counter verdicts[VERDICT_COUNT];
};

/* Says what a loaded program is, to a process that did not load it. */
struct program_meta {
	__u32 abi_version;
	__u32 fwmark_mask;
	__u32 networks_capacity;
	__u32 counters_capacity;
	__u8 digest[32]; /* SHA-256 of the text that was compiled */
};

#endif
