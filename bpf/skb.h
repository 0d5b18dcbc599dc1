/* SPDX-License-Identifier: GPL-2.0-only */
/* The packet of the kernel: how cursor.h reads it, and how it counts. */
#ifndef DATAPATH_SKB_H
#define DATAPATH_SKB_H

#include <linux/bpf.h>

#define PACKET_TYPE struct __sk_buff

/*
 * bpf_skb_load_bytes and not direct access: drivers may leave headers outside the linear part, where direct
 * access would see a truncated packet and a hostile sender could choose what is checked.
 */
static __always_inline long packet_load(struct __sk_buff *skb, __u32 offset, void *to, __u32 size)
{
	return bpf_skb_load_bytes(skb, offset, to, size);
}

static __always_inline __u32 packet_length(const struct __sk_buff *skb)
{
	return skb->len;
}

static __always_inline _Bool packet_is_merged(const struct __sk_buff *skb)
{
	return skb->gso_segs > 1;
}

/* GRO merges segments into one skb before tc sees them; count what was on the wire. */
static __always_inline __u64 packet_segments(const struct __sk_buff *skb)
{
	return skb->gso_segs ? skb->gso_segs : 1;
}

#endif
