/* SPDX-License-Identifier: GPL-2.0-only */
/* The packet of the kernel: how cursor.h reads it, and how it counts. */
#ifndef DATAPATH_SKB_H
#define DATAPATH_SKB_H

#include <linux/bpf.h>
#include <linux/if_ether.h>

#define PACKET_TYPE struct __sk_buff

/*
 * bpf_skb_load_bytes and not direct access alone: drivers may leave headers outside the linear part, where direct
 * access would see a truncated packet and a hostile sender could choose what is checked.
 */
static __always_inline long packet_load(struct __sk_buff *skb, __u32 offset, void *to, __u32 size)
{
	return bpf_skb_load_bytes(skb, offset, to, size);
}

/*
 * The same at a known offset, without a call where those bytes are linear, as nearly always. At offsets that only the packet
 * tells it would be too much for the verifier.
 */
static __always_inline long packet_load_at(struct __sk_buff *skb, const __u32 offset, void *to, __u32 size)
{
	unsigned long start = (unsigned long)skb->data + offset;
	const void *from = (const void *)start;

	if (start + size > (unsigned long)skb->data_end)
		return packet_load(skb, offset, to, size);
	/* Ethernet headers lie so that what follows them is aligned. */
	__builtin_memcpy(to, __builtin_assume_aligned(from, 4), size);
	return 0;
}

/* The first header behind Ethernet. */
static __always_inline long packet_load_first(struct __sk_buff *skb, __u32 offset, void *to, __u32 size)
{
	return offset == ETH_HLEN ? packet_load_at(skb, ETH_HLEN, to, size) : packet_load(skb, offset, to, size);
}
#define packet_load_first packet_load_first

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
