/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The IPv4 or IPv6 header and what the checks need from behind it. Plain C.
 *
 * False means malformed: the IP stack would drop the packet too, or (too many extension headers) nobody sends it.
 * The transport header is the business of others: ports that are not there are 0.
 */
#ifndef DATAPATH_IP_H
#define DATAPATH_IP_H

#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>

#include "bytes.h"
#include "cursor.h"

/* More have no use, and each costs the verifier another pass. */
#define EXTENSION_HEADERS_MAX 8

/* Extension headers (RFC 8200); linux/in6.h has the names but not for native builds beside netinet/in.h. */
#define NEXT_HOP_BY_HOP 0
#define NEXT_ROUTING 43
#define NEXT_FRAGMENT 44
#define NEXT_AUTHENTICATION 51
#define NEXT_ICMPV6 58
#define NEXT_DESTINATION 60

#define IPV4_OFFSET_MASK 0x1fff
#define IPV6_OFFSET_MASK 0xfff8

struct ip_packet {
	__u8 version; /* 4 or 6; 0 until the addresses are known */
	__u8 protocol;
	__u8 hop_limit;
	__u8 icmp_type; /* of an unfragmented ICMPv6 message, otherwise 0 */
	__u32 end; /* of the packet in the frame, or 0 for a later fragment: it has no ports */
	__be32 source[4]; /* IPv4: the first of four, the others 0 */
	__be32 destination[4];
};

static __always_inline _Bool has_ports(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP ||
	       protocol == IPPROTO_UDPLITE || protocol == IPPROTO_DCCP;
}

struct ports {
	__u16 source; /* host order; both 0 where there are none */
	__u16 destination;
};

/*
 * Ports behind the headers that were read: `cursor` is where read_ipv4() or read_ipv6() left it, and stays there. Only few
 * packets need them, so nobody else pays for them.
 */
static __always_inline struct ports read_ports(const struct cursor *cursor, const struct ip_packet *packet)
{
	struct cursor transport = *cursor;
	struct ports ports = {};
	__be16 raw[2];

	if (!has_ports(packet->protocol) || transport.offset + sizeof(raw) > packet->end)
		return ports;
	if (!cursor_read(&transport, raw, sizeof(raw)))
		return ports;
	ports.source = BE16(raw[0]);
	ports.destination = BE16(raw[1]);
	return ports;
}

/* `merged`: GRO made one packet of several, which may be longer than the length field can say (BIG TCP). */
static __always_inline _Bool read_ipv4(struct cursor *cursor, __u32 length, _Bool merged, struct ip_packet *packet)
{
	__u32 start = cursor->offset;
	struct iphdr header;
	__u32 header_length, total;

	if (!cursor_read_first(cursor, &header, sizeof(header)))
		return 0;
	header_length = header.ihl * 4;
	total = BE16(header.tot_len);
	if (total == 0 && merged)
		total = length - start;
	if (header.version != 4 || header_length < sizeof(header) || total < header_length || total > length - start)
		return 0;

	packet->version = 4;
	packet->protocol = header.protocol;
	packet->hop_limit = header.ttl;
	packet->source[0] = header.saddr;
	packet->destination[0] = header.daddr;
	cursor->offset = start + header_length;
	if ((BE16(header.frag_off) & IPV4_OFFSET_MASK) == 0)
		packet->end = start + total;
	return 1;
}

/* One extension header at the cursor; steps over it. */
struct extension {
	__u8 next_header;
	__u8 length;
	__be16 fragment_offset;
	__u32 rest;
};

static __always_inline __u32 extension_size(__u8 kind, __u8 length)
{
	if (kind == NEXT_FRAGMENT)
		return 8;
	if (kind == NEXT_AUTHENTICATION)
		return (length + 2) * 4;
	return (length + 1) * 8;
}

static __always_inline _Bool is_extension(__u8 kind)
{
	return kind == NEXT_HOP_BY_HOP || kind == NEXT_ROUTING || kind == NEXT_FRAGMENT ||
	       kind == NEXT_AUTHENTICATION || kind == NEXT_DESTINATION;
}

/*
 * Walks to the upper-layer header. `*fragmented`: there is a fragment header. A later fragment ends the walk: what
 * follows is not a header.
 */
static __always_inline _Bool skip_extensions(struct cursor *cursor, __u32 end, struct ip_packet *packet,
					     _Bool *fragmented, _Bool *later)
{
	struct extension extension;
	__u32 start, size;
	int i;

	for (i = 0; i < EXTENSION_HEADERS_MAX; i++) {
		if (!is_extension(packet->protocol))
			return 1;
		start = cursor->offset;
		if (start + sizeof(extension) > end || !cursor_read(cursor, &extension, sizeof(extension)))
			return 0;
		size = extension_size(packet->protocol, extension.length);
		if (size > end - start)
			return 0;
		cursor->offset = start + size;
		if (packet->protocol == NEXT_FRAGMENT)
			*fragmented = 1;
		if (packet->protocol == NEXT_FRAGMENT && (BE16(extension.fragment_offset) & IPV6_OFFSET_MASK) != 0) {
			packet->protocol = extension.next_header;
			*later = 1;
			return 1;
		}
		packet->protocol = extension.next_header;
	}
	return !is_extension(packet->protocol);
}

static __always_inline _Bool read_ipv6(struct cursor *cursor, __u32 length, struct ip_packet *packet)
{
	_Bool fragmented = 0, later = 0;
	struct ipv6hdr header;
	__u32 payload, end;

	if (!cursor_read_first(cursor, &header, sizeof(header)) || header.version != 6)
		return 0;
	/* 0: a jumbogram, or BIG TCP: the frame says how long it is. */
	payload = BE16(header.payload_len);
	end = payload ? cursor->offset + payload : length;
	if (end > length)
		return 0;

	packet->version = 6;
	packet->protocol = header.nexthdr;
	packet->hop_limit = header.hop_limit;
	__builtin_memcpy(packet->source, &header.saddr, sizeof(packet->source));
	__builtin_memcpy(packet->destination, &header.daddr, sizeof(packet->destination));
	if (!skip_extensions(cursor, end, packet, &fragmented, &later))
		return 0;
	if (later)
		return 1;
	packet->end = end;
	if (packet->protocol == NEXT_ICMPV6 && !fragmented && cursor->offset + 1 <= end)
		cursor_read(cursor, &packet->icmp_type, sizeof(packet->icmp_type));
	return 1;
}

#endif
