/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The Ethernet header and the VLAN tag that decides which device gets the packet. Plain C.
 *
 * The kernel moves the outermost tag to metadata before tc ingress runs, also for veth; an in-band tag is an
 * inner one then, or one that the kernel has not seen yet.
 */
#ifndef DATAPATH_VLAN_H
#define DATAPATH_VLAN_H

#include <linux/if_ether.h>

#include "bytes.h"
#include "cursor.h"

/*
 * A priority tag (VLAN id 0) before another tag is removed by the kernel, which then looks at the next one, any
 * number of times (__netif_receive_skb_core, Linux 5.1). So must we, or a sender could slip past the check by
 * adding one. More than this many in a row have no use, and such a frame is malformed.
 */
#define PRIORITY_TAGS_MAX 8

enum frame_result {
	FRAME_OK,
	FRAME_TRUNCATED,
	FRAME_TOO_MANY_TAGS,
};

struct frame {
	__u16 vlan_proto; /* of the tag that counts, host order; 0 without one */
	__u16 vlan_id;
	__u16 ethertype; /* behind that tag, host order */
};

static __always_inline _Bool is_vlan_ethertype(__u16 ethertype)
{
	return ethertype == ETH_P_8021Q || ethertype == ETH_P_8021AD;
}

/*
 * Reads the Ethernet header and in-band tags, up to the payload. `frame` holds the metadata tag on entry, if there is
 * one.
 */
static __always_inline enum frame_result read_frame(struct cursor *cursor, struct frame *frame)
{
	struct ethhdr ethernet;
	struct {
		__be16 tci;
		__be16 ethertype;
	} tag;
	int i;

	if (!cursor_read(cursor, &ethernet, sizeof(ethernet)))
		return FRAME_TRUNCATED;
	frame->ethertype = BE16(ethernet.h_proto);

	for (i = 0; i <= PRIORITY_TAGS_MAX; i++) {
		if (frame->vlan_id != 0 || !is_vlan_ethertype(frame->ethertype))
			break;
		if (!cursor_read(cursor, &tag, sizeof(tag)))
			return FRAME_TRUNCATED;
		frame->vlan_proto = frame->ethertype;
		frame->vlan_id = BE16(tag.tci) & 0x0fff;
		frame->ethertype = BE16(tag.ethertype);
	}
	if (frame->vlan_id == 0) {
		if (is_vlan_ethertype(frame->ethertype))
			return FRAME_TOO_MANY_TAGS;
		frame->vlan_proto = 0;
	}
	return FRAME_OK;
}

#endif
