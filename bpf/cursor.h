/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Reading a packet from front to back.
 *
 * Contract: `cursor_read` copies `size` bytes and advances, or returns false, copies nothing that may be
 * used and does not advance. The ingress program reads packet bytes by
 * nothing else, so nothing else can read out of bounds.
 *
 * Plain C: whoever includes this defines `packet_load` first (skb.h for the kernel, a bounded memcpy in a
 * fuzzer).
 */
#ifndef DATAPATH_CURSOR_H
#define DATAPATH_CURSOR_H

#include <linux/types.h>

/* Outside the kernel a packet is a struct packet of the includer's own; inside it is the __sk_buff. */
#ifndef PACKET_TYPE
#define PACKET_TYPE struct packet
#endif

/* The includer may know a shorter way to what nearly every packet has at the same place. */
#ifndef packet_load_first
#define packet_load_first packet_load
#endif

struct cursor {
	PACKET_TYPE *packet;
	__u32 offset;
};

static __always_inline _Bool cursor_read(struct cursor *cursor, void *to, __u32 size)
{
	if (packet_load(cursor->packet, cursor->offset, to, size) != 0)
		return 0;
	cursor->offset += size;
	return 1;
}

/* The same, of the first header behind Ethernet. */
static __always_inline _Bool cursor_read_first(struct cursor *cursor, void *to, __u32 size)
{
	if (packet_load_first(cursor->packet, cursor->offset, to, size) != 0)
		return 0;
	cursor->offset += size;
	return 1;
}

#endif
