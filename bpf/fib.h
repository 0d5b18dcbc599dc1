/* SPDX-License-Identifier: GPL-2.0-only */
/* The kernel's own answer: where would a packet to this source go? */
#ifndef DATAPATH_FIB_H
#define DATAPATH_FIB_H

#include <linux/bpf.h>

#include "ip.h"
#include "scope.h"

#define AF_INET_NUMBER 2
#define AF_INET6_NUMBER 10

enum reverse_path {
	REVERSE_PATH_NONE,
	REVERSE_PATH_OTHER,   /* a route, but by another device */
	REVERSE_PATH_DEVICE,  /* by the network's device */
	REVERSE_PATH_UNKNOWN, /* the kernel does not answer */
};

/*
 * Looks up the source as destination, as the reply's first packet would be, without a mark.
 *
 * Without flags: BPF_FIB_LOOKUP_SKIP_NEIGH needs Linux 6.3, _TBID 6.5 and _MARK 6.10, and 6.1 refuses unknown ones.
 * So NO_NEIGH is a found route; and FRAG_NEEDED is one, because the helper compares this packet with the
 * MTU of that device. The lookup starts at the network's device, not at the trunk: rules by device and VRFs answer
 * for it.
 *
 * The helper answers NOT_FWDED for any IPv6 source or destination that is multicast, loopback or link-local; a packet
 * to such an address is looked up without a source instead.
 *
 * With forwarding off on that device the helper refuses to look (FWD_DISABLED): that is no failed check.
 * An encapsulating route (UNSUPP_LWT) leaves the device unset.
 */
static __always_inline enum reverse_path reverse_path(struct __sk_buff *skb, const struct network *network,
						      const struct ip_packet *packet)
{
	struct bpf_fib_lookup lookup = { .ifindex = network->device_ifindex };
	long result;

	if (packet->version == 4) {
		lookup.family = AF_INET_NUMBER;
		lookup.ipv4_src = packet->destination[0];
		lookup.ipv4_dst = packet->source[0];
	} else {
		lookup.family = AF_INET6_NUMBER;
		if (is_routable6(packet->destination))
			__builtin_memcpy(lookup.ipv6_src, packet->destination, sizeof(lookup.ipv6_src));
		__builtin_memcpy(lookup.ipv6_dst, packet->source, sizeof(lookup.ipv6_dst));
	}
	result = bpf_fib_lookup(skb, &lookup, sizeof(lookup), 0);
	switch (result) {
	case BPF_FIB_LKUP_RET_SUCCESS:
	case BPF_FIB_LKUP_RET_NO_NEIGH:
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		return lookup.ifindex == network->device_ifindex ? REVERSE_PATH_DEVICE : REVERSE_PATH_OTHER;
	case BPF_FIB_LKUP_RET_UNSUPP_LWT:
		return REVERSE_PATH_OTHER;
	case BPF_FIB_LKUP_RET_FWD_DISABLED:
		return REVERSE_PATH_UNKNOWN;
	default:
		return REVERSE_PATH_NONE;
	}
}

static __always_inline _Bool is_strictly_reachable(enum reverse_path path)
{
	return path == REVERSE_PATH_DEVICE || path == REVERSE_PATH_UNKNOWN;
}

#endif
