/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What addresses mean before any policy: martians, and the traffic of the link itself, which has no reverse path.
 * Plain C.
 */
#ifndef DATAPATH_SCOPE_H
#define DATAPATH_SCOPE_H

#include "bytes.h"
#include "ip.h"

#define DHCP_SERVER 67
#define DHCP_CLIENT 68
#define DHCPV6_CLIENT 546
#define DHCPV6_SERVER 547

#define ICMPV6_MLD_QUERY 130
#define ICMPV6_MLD_DONE 132
#define ICMPV6_ROUTER_SOLICITATION 133
#define ICMPV6_REDIRECT 137
#define ICMPV6_MLD2_REPORT 143

static __always_inline _Bool is_v4_in(__be32 address, __u32 prefix, __u32 mask)
{
	return (BE32(address) & mask) == prefix;
}

static __always_inline _Bool is_link_local6(const __be32 *address)
{
	return (BE32(address[0]) & 0xffc00000) == 0xfe800000;
}

static __always_inline _Bool is_unspecified6(const __be32 *address)
{
	return !(address[0] | address[1] | address[2] | address[3]);
}

static __always_inline _Bool is_loopback6(const __be32 *address)
{
	return !address[0] && !address[1] && !address[2] && BE32(address[3]) == 1;
}

/* An address that a route could be asked for. */
static __always_inline _Bool is_routable6(const __be32 *address)
{
	return BE32(address[0]) >> 24 != 0xff && !is_link_local6(address) && !is_loopback6(address);
}

/*
 * Sources that are never right on a wire: 0/8, 127/8, multicast, and 240/4 with the broadcast address. For
 * IPv6 ::/96 (unspecified, loopback, IPv4-compatible), IPv4-mapped and multicast. ::/8 as a whole is
 * reserved, but NAT64 (64:ff9b::/96) lies in it.
 */
static __always_inline _Bool is_martian(const struct ip_packet *packet)
{
	const __be32 *source = packet->source;
	__u32 first;

	if (packet->version == 4) {
		first = BE32(source[0]) >> 24;
		return first == 0 || first == 127 || first >= 224;
	}
	if (BE32(source[0]) >> 24 == 0xff)
		return 1;
	return !source[0] && !source[1] && (!source[2] || BE32(source[2]) == 0x0000ffff);
}

/* RFC 4861: hop limit 255 proves that no router forwarded it. RFC 6980: never in fragments (icmp_type is 0 then). */
static __always_inline _Bool is_neighbour_discovery(const struct ip_packet *packet)
{
	return packet->protocol == NEXT_ICMPV6 && packet->hop_limit == 255 &&
	       packet->icmp_type >= ICMPV6_ROUTER_SOLICITATION && packet->icmp_type <= ICMPV6_REDIRECT;
}

/* RFC 3810: from a link-local address, or :: before there is one. */
static __always_inline _Bool is_listener_discovery(const struct ip_packet *packet)
{
	return packet->protocol == NEXT_ICMPV6 && packet->hop_limit == 1 && is_unspecified6(packet->source) &&
	       ((packet->icmp_type >= ICMPV6_MLD_QUERY && packet->icmp_type <= ICMPV6_MLD_DONE) ||
		packet->icmp_type == ICMPV6_MLD2_REPORT);
}

/* A host that has no address yet: DHCP, and IGMP of hosts and snooping switches. */
static __always_inline _Bool is_from_unnumbered4(const struct cursor *cursor, const struct ip_packet *packet)
{
	struct ports ports;

	if (packet->source[0] != 0)
		return 0;
	if (packet->protocol == IPPROTO_IGMP)
		return is_v4_in(packet->destination[0], 0xe0000000, 0xf0000000);
	if (packet->protocol != IPPROTO_UDP || BE32(packet->destination[0]) != 0xffffffff)
		return 0;
	ports = read_ports(cursor, packet);
	return ports.source == DHCP_CLIENT && ports.destination == DHCP_SERVER;
}

/*
 * Traffic that keeps the link going whatever its source: it passes before the first check. Link-local IPv6 sources
 * do so as a whole: the kernel never forwards them. (It does forward 169.254/16: no such rule for IPv4.)
 */
static __always_inline _Bool is_link_traffic(const struct cursor *cursor, const struct ip_packet *packet)
{
	if (packet->version == 4)
		return is_from_unnumbered4(cursor, packet);
	return is_link_local6(packet->source) || is_neighbour_discovery(packet) || is_listener_discovery(packet);
}

/*
 * Traffic without a reverse path, though its source must be acceptable: to all on the link (the kernel's rp_filter
 * leaves 224.0.0.0/24 out, too), ...
 */
static __always_inline _Bool is_to_all_on_link(const struct ip_packet *packet)
{
	__u32 first = BE32(packet->destination[0]);

	if (packet->version == 4)
		return first == 0xffffffff || (first & 0xffffff00) == 0xe0000000;
	return (first & 0xff0f0000) == 0xff010000 || (first & 0xff0f0000) == 0xff020000;
}

/* ... and answers of a DHCP server to a client that has no route yet. */
static __always_inline _Bool is_dhcp_answer(const struct cursor *cursor, const struct ip_packet *packet)
{
	struct ports ports;

	if (packet->protocol != IPPROTO_UDP)
		return 0;
	if (packet->version == 6 && !is_link_local6(packet->destination))
		return 0;
	ports = read_ports(cursor, packet);
	if (packet->version == 4)
		return ports.source == DHCP_SERVER && ports.destination == DHCP_CLIENT;
	return ports.source == DHCPV6_SERVER && ports.destination == DHCPV6_CLIENT;
}

#endif
