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

/* To be raised with every change of this file: a program of another version is replaced, never updated. */
#define ABI_VERSION 6

/* Slot 0 belongs to no network: it holds the source rules of all, and counts what is dropped before one is known. */
#define SLOT_NONE 0

/*
 * vlan_proto of a key that stands for a device with checked networks: a frame that hides its tag behind too many
 * others is dropped there.
 */
#define VLAN_PROTO_GUARD 0xffff

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

enum source_check {
	SOURCE_CHECK_OFF,
	SOURCE_CHECK_COMMON, /* only the rules of slot 0 */
	SOURCE_CHECK_EXCEPT, /* the network's own only allow: they are asked where those of slot 0 deny */
	SOURCE_CHECK_OWN,    /* both */
};

enum source_action {
	SOURCE_ALLOW = 1,
	SOURCE_DENY = 2,
};

/* Bits of `struct network.feasible_everywhere` and `more_vips`. */
#define FEASIBLE_EVERYWHERE4 1
#define FEASIBLE_EVERYWHERE6 2
#define MORE_VIPS4 1
#define MORE_VIPS6 2

/* Where a network's packets are first seen. */
struct network_key {
	__u32 ifindex;
	__u16 vlan_proto; /* host order; 0 without a tag */
	__u16 vlan_id;
};

/*
 * Of its VIP prefixes the first of each IP version lies here; dp_vips is asked only if there are more. None: address all
 * ones, mask 0, which no address fits.
 */
struct network {
	__u32 fwmark;         /* 0: leave the mark alone */
	__u32 device_ifindex; /* where the IP stack sees the packet: not the trunk */
	__u16 slot;
	__u8 vip_check;
	__u8 other_check;
	__u8 check_martians;
	__u8 source_check;
	__u8 feasible_everywhere; /* FEASIBLE_EVERYWHERE4 and 6: its table has a default route, no prefix need be asked */
	__u8 more_vips;           /* MORE_VIPS4 and 6 */
	__be32 vip4;
	__be32 vip4_mask;
	__be32 vip6[4];
	__be32 vip6_mask[4];
};

struct counter {
	__u64 packets;
	__u64 bytes;
};

struct network_counters {
	struct counter verdicts[VERDICT_COUNT];
};

/*
 * Keys of the tries. The slot comes first and is always matched in full, so one trie holds the prefixes of all
 * networks; prefix_length counts its 32 bits too.
 */
#define SLOT_BITS 32

struct prefix4_key {
	__u32 prefix_length;
	__u32 slot;
	__be32 address;
};

struct prefix6_key {
	__u32 prefix_length;
	__u32 slot;
	__be32 address[4];
};

/* Keys and values of `steering: direct`: the source of an answer, and where its network is left to. */
struct vip4_key {
	__u32 prefix_length;
	__be32 address;
};

struct vip6_key {
	__u32 prefix_length;
	__be32 address[4];
};

/* Of `on_link` the first prefix lies here; dp_targets is asked only if there are more. None: 0, mask all ones. */
struct steered_network4 {
	__u32 ifindex;
	__be32 gateway;
	__be32 link;
	__be32 link_mask;
	__u16 slot;
	__u8 more_links;
	__u8 reserved;
};

struct steered_network6 {
	__u32 ifindex;
	__be32 gateway[4];
	__be32 link[4];
	__be32 link_mask[4];
	__u16 slot;
	__u8 more_links;
	__u8 reserved;
};

/*
 * The tries of `steering: direct` have everything; what lies here spares nearly every packet both of its look-ups there.
 * User space writes it only while it is off, and no program that has seen it on is still running.
 */
enum index_state {
	INDEX_OFF,   /* ask the tries */
	INDEX_PART,  /* VIPs with shorter prefixes are in the trie only */
	INDEX_WHOLE, /* a source that is neither in its bucket nor sent on to the trie by it is no VIP */
};

/* By hash of the masked source. Empty: ifindex 0. */
struct indexed_network4 {
	__be32 address;
	__u8 ask_trie; /* another VIP would lie here, or one with a longer prefix */
	__u8 reserved[3];
	struct steered_network4 network;
};

struct indexed_network6 {
	__be32 address[4];
	__u8 ask_trie;
	__u8 reserved[3];
	struct steered_network6 network;
};

#define PASSED_FIRST 8

/* None: address all ones, mask 0, which no address fits. */
struct passed4 {
	__be32 address;
	__be32 mask;
};

/* The first half of a prefix. */
struct passed6 {
	__be64 address;
	__be64 mask;
};

struct steering_index {
	__u64 multiplier4;
	__u64 multiplier6;
	__be32 mask4; /* of the most frequent length of VIPs */
	__be32 mask6[4];
	__u8 state4; /* enum index_state */
	__u8 state6;
	__u8 reserved[2];
	struct passed4 passed4[PASSED_FIRST]; /* who is in none of them is not in slot 0 of dp_targets */
	struct passed6 passed6[PASSED_FIRST];
};

/* What the longest match says. `length` is that of the address part: two lists are compared by it. */
struct prefix_value {
	__u8 action; /* enum source_action; SOURCE_ALLOW in the other tries */
	__u8 length;
	__u8 reserved[2];
};

/* Written by the reader of drop samples; without one nothing is sampled. */
struct drop_control {
	__u64 until_ns; /* CLOCK_MONOTONIC: a reader that died is forgotten */
	__u32 per_second; /* and CPU */
	__u32 reader;
};

struct drop_window {
	__u64 start_ns;
	__u64 samples;
};

struct drop_event {
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u32 ifindex; /* where the program is attached */
	__u16 slot;
	__u16 source_port; /* 0 without ports or in a later fragment */
	__u16 destination_port;
	__u8 verdict;
	__u8 version; /* 4, 6; 0 if malformed */
	__u8 protocol;
	__u8 reserved[3];
	__be32 source[4]; /* IPv4: the first of four */
	__be32 destination[4];
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
