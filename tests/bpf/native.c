/* SPDX-License-Identifier: GPL-2.0-only */
/* The parse headers outside the kernel: what a fuzzer includes. */
#include <string.h>

#include <linux/types.h>

struct packet {
	const unsigned char *data;
	__u32 length;
};

static inline long packet_load(struct packet *packet, __u32 offset, void *to, __u32 size)
{
	if (offset > packet->length || size > packet->length - offset)
		return -1;
	memcpy(to, packet->data + offset, size);
	return 0;
}

#include "bytes.h"
#include "cursor.h"
#include "vlan.h"
#include "ip.h"
#include "scope.h"

/* As decide() in ingress.bpf.c: 0 for what is no IP packet, 1 malformed, 2 well-formed; 4 more for martians. */
int parse_native(const unsigned char *data, __u32 length)
{
	struct packet packet = { data, length };
	struct cursor cursor = { .packet = &packet };
	struct ip_packet ip = {};
	struct frame frame = {};
	_Bool well_formed;

	if (read_frame(&cursor, &frame) != FRAME_OK)
		return 0;
	if (frame.ethertype == ETH_P_IP)
		well_formed = read_ipv4(&cursor, length, 0, &ip);
	else if (frame.ethertype == ETH_P_IPV6)
		well_formed = read_ipv6(&cursor, length, &ip);
	else
		return 0;
	if (!well_formed)
		return 1;
	if (!is_martian(&ip) || is_link_traffic(&cursor, &ip))
		return 2;
	return is_to_all_on_link(&ip) || is_dhcp_answer(&cursor, &ip) ? 2 : 6;
}
