# SPDX-License-Identifier: Apache-2.0
"""The mutants: one changed condition, bound, field or byte order each. The text before must be there exactly once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change.

    Attributes:
        file: below bpf/.
        equivalent: why no test can notice it; empty if one must.
    """

    file: str
    before: str
    after: str
    equivalent: str = ""

    @property
    def title(self) -> str:
        """On one line."""
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{before} -> {after or '(nothing)'}"

    def apply(self, bpf: Path) -> None:
        """Change the file in this copy.

        Raises:
            ValueError: the text is not there exactly once: the program has changed, and so must the mutant.
        """
        path = bpf / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.before) != 1:
            raise ValueError(f"bpf/{self.file} has {text.count(self.before)} times: {self.before!r}")
        path.write_text(text.replace(self.before, self.after), encoding="utf-8")


def _of(file: str, *changes: tuple[str, str] | tuple[str, str, str]) -> tuple[Mutant, ...]:
    return tuple(Mutant(file, *change) for change in changes)


_PARSER: Final = (
    *_of(
        "ip.h",
        ("protocol == IPPROTO_TCP || protocol == IPPROTO_UDP", "protocol == IPPROTO_UDP"),
        ("transport.offset + sizeof(raw) > packet->end", "transport.offset + sizeof(raw) >= packet->end"),
        (" || transport.offset + sizeof(raw) > packet->end", ""),
        ("ports.source = BE16(raw[0])", "ports.source = BE16(raw[1])"),
        ("ports.destination = BE16(raw[1])", "ports.destination = raw[1]"),
        ("header_length = header.ihl * 4", "header_length = sizeof(header)"),
        ("total == 0 && merged", "total == 0"),
        ("total == 0 && merged", "merged"),
        ("header.version != 4 || ", ""),
        ("header_length < sizeof(header)", "header_length <= sizeof(header)"),
        ("total < header_length", "total <= header_length"),
        ("total > length - start", "total >= length - start"),
        (" || total > length - start", ""),
        ("IPV4_OFFSET_MASK 0x1fff", "IPV4_OFFSET_MASK 0x3fff"),
        ("IPV4_OFFSET_MASK 0x1fff", "IPV4_OFFSET_MASK 0x1f00"),
        ("packet->end = start + total", "packet->end = length"),
        ("packet->end = end", "packet->end = length"),
        ("cursor->offset = start + header_length", "cursor->offset = start + sizeof(header)"),
        ("packet->source[0] = header.saddr", "packet->source[0] = header.daddr"),
        ("if (kind == NEXT_FRAGMENT)\n\t\treturn 8;", ""),
        ("(length + 2) * 4", "(length + 1) * 4"),
        ("(length + 1) * 8", "length * 8"),
        (" || kind == NEXT_DESTINATION", ""),
        ("EXTENSION_HEADERS_MAX 8", "EXTENSION_HEADERS_MAX 7"),
        ("EXTENSION_HEADERS_MAX 8", "EXTENSION_HEADERS_MAX 9"),
        ("start + sizeof(extension) > end", "start + sizeof(extension) >= end"),
        ("size > end - start", "size >= end - start"),
        ("if (size > end - start)\n\t\t\treturn 0;", ""),
        ("*fragmented = 1", "*fragmented = 0"),
        ("IPV6_OFFSET_MASK 0xfff8", "IPV6_OFFSET_MASK 0xffff"),
        ("*later = 1", "*later = 0"),
        ("return !is_extension(packet->protocol)", "return 1"),
        ("header.version != 6", "0"),
        ("payload ? cursor->offset + payload : length", "cursor->offset + payload"),
        ("if (end > length)", "if (end >= length)"),
        ("packet->hop_limit = header.hop_limit", "packet->hop_limit = 255"),
        (" && !fragmented", ""),
        ("cursor->offset + 1 <= end", "cursor->offset + 1 < end"),
    ),
    *_of(
        "vlan.h",
        ("PRIORITY_TAGS_MAX 8", "PRIORITY_TAGS_MAX 7"),
        ("i <= PRIORITY_TAGS_MAX", "i < PRIORITY_TAGS_MAX"),
        ("frame->vlan_id != 0 || ", ""),
        ("& 0x0fff", "& 0xffff"),
        (" || ethertype == ETH_P_8021AD", ""),
        ("frame->vlan_proto = frame->ethertype", "frame->vlan_proto = ETH_P_8021Q"),
        ("frame->vlan_proto = 0;", ""),
        ("return FRAME_TOO_MANY_TAGS", "return FRAME_OK"),
    ),
    *_of("bytes.h", ("__builtin_bswap32((__u32)(x))", "(x)"), ("__builtin_bswap16((__u16)(x))", "(x)")),
    *_of(
        "cursor.h",
        (
            "packet_load(cursor->packet, cursor->offset, to, size) != 0)\n\t\treturn 0;\n\tcursor->offset += size",
            "packet_load(cursor->packet, cursor->offset, to, size) != 0)\n\t\treturn 0;\n\tcursor->offset += 0",
        ),
        (
            "first(cursor->packet, cursor->offset, to, size) != 0)\n\t\treturn 0;\n\tcursor->offset += size",
            "first(cursor->packet, cursor->offset, to, size) != 0)\n\t\treturn 0;\n\tcursor->offset += 0",
        ),
        (
            "packet_load(cursor->packet, cursor->offset, to, size) != 0)\n\t\treturn 0;",
            "packet_load(cursor->packet, cursor->offset, to, size) != 0)\n\t\treturn 1;",
            (
                "the kernel zeroes what it cannot load, and zeroes are no IP header, no tag and no EtherType of ours; "
                "the length fields are compared with the frame before anything else is loaded"
            ),
        ),
    ),
    *_of(
        "classify.h",
        ("BE16(skb->vlan_proto)", "skb->vlan_proto"),
        ("skb->vlan_tci & 0x0fff", "skb->vlan_tci"),
        (".ifindex = skb->ifindex", ".ifindex = 1"),
        (".vlan_proto = frame->vlan_proto", ".vlan_proto = 0"),
        (".vlan_id = frame->vlan_id", ".vlan_id = 0"),
        (" || frame->ethertype == ETH_P_IPV6", ""),
        (
            "if (!skb->vlan_present)\n\t\treturn;",
            "",
            "without a tag the VLAN id is 0, and whoever reads the frame replaces the protocol then",
        ),
        ("if (!is_ip(frame))\n\t\treturn 0;", ""),
        ("if (frame->vlan_id == 0)\n\t\tframe->vlan_proto = 0;", ""),
        ("cursor->offset = ETH_HLEN", "cursor->offset = 0"),
    ),
    *_of("skb.h", ("skb->gso_segs > 1", "skb->gso_segs > 0"), ("skb->gso_segs ? skb->gso_segs : 1", "1")),
    *_of("skb.h", ("skb->gso_segs ? skb->gso_segs : 1", "skb->gso_segs")),
    *_of(
        "skb.h",
        ("offset == ETH_HLEN ?", "1 ?"),
        ("data_end)\n\t\treturn packet_load(skb, offset, to, size);", "data_end)\n\t\treturn -1;"),
        ("start + size > (unsigned long)skb->data_end", "start > (unsigned long)skb->data_end"),
    ),
)

_SCOPE: Final = _of(
    "scope.h",
    ("& 0xffc00000", "& 0xffff0000"),
    ("!(address[0] | address[1] | address[2] | address[3])", "!(address[0] | address[1] | address[2])"),
    (">> 24 != 0xff && !is_link_local6(address)", ">> 24 != 0xff"),
    ("BE32(address[0]) >> 24 != 0xff && ", ""),
    (" && !is_loopback6(address)", ""),
    ("first == 0 || first == 127", "first == 127"),
    ("first == 127", "first == 126"),
    ("first >= 224", "first > 224"),
    ("== 0xff)\n\t\treturn 1;", "== 0xff)\n\t\treturn 0;"),
    ("(!source[2] || BE32(source[2]) == 0x0000ffff)", "!source[2]"),
    ("(!source[2] || BE32(source[2]) == 0x0000ffff)", "1"),
    (" && packet->hop_limit == 255", ""),
    ("icmp_type >= ICMPV6_ROUTER_SOLICITATION", "icmp_type > ICMPV6_ROUTER_SOLICITATION"),
    ("icmp_type <= ICMPV6_REDIRECT", "icmp_type < ICMPV6_REDIRECT"),
    (" && packet->hop_limit == 1", ""),
    (" && is_unspecified6(packet->source)", ""),
    ("icmp_type >= ICMPV6_MLD_QUERY", "icmp_type > ICMPV6_MLD_QUERY"),
    ("icmp_type <= ICMPV6_MLD_DONE", "icmp_type < ICMPV6_MLD_DONE"),
    ("packet->icmp_type == ICMPV6_MLD2_REPORT", "0"),
    ("if (packet->source[0] != 0)\n\t\treturn 0;", ""),
    ("0xe0000000, 0xf0000000", "0xe0000000, 0xff000000"),
    ("ports.source == DHCP_CLIENT && ", ""),
    ("BE32(packet->destination[0]) != 0xffffffff", "0"),
    ("return is_link_local6(packet->source) || ", "return "),
    (" || is_listener_discovery(packet)", ""),
    ("return first == 0xffffffff || ", "return "),
    ("(first & 0xffffff00) == 0xe0000000", "(first & 0xffff0000) == 0xe0000000"),
    ("ports.source == DHCP_SERVER && ", ""),
    ("(first & 0xff0f0000) == 0xff010000 || ", ""),
    ("(first & 0xff0f0000) == 0xff020000", "(first & 0xffff0000) == 0xff020000"),
    ("ports.source == DHCPV6_SERVER && ", ""),
    ("packet->version == 6 && !is_link_local6(packet->destination)", "0"),
    ("if (packet->protocol != IPPROTO_UDP)\n\t\treturn 0;", ""),
)

_POLICY: Final = (
    *_of(
        "prefixes.h",
        ("SLOT_BITS + 32, .slot = slot", "SLOT_BITS + 32, .slot = 0"),
        ("SLOT_BITS + 128, .slot = slot", "SLOT_BITS + 128, .slot = 0"),
        ("SLOT_BITS + 32,", "SLOT_BITS + 31,"),
        ("SLOT_BITS + 128,", "SLOT_BITS + 127,"),
        ("own->length >= common->length", "own->length > common->length"),
        ("own && (!common || own->length >= common->length)", "own"),
        ("own->action == SOURCE_DENY", "own->action == SOURCE_ALLOW"),
        ("\treturn denied;\n}", "\treturn 0;\n}"),
        ("common && common->action == SOURCE_DENY", "0"),
        ("SOURCE_CHECK_EXCEPT && !denied", "SOURCE_CHECK_EXCEPT"),
        ("SOURCE_CHECK_EXCEPT && !denied", "SOURCE_CHECK_OWN && !denied"),
        (
            " || (network->source_check == SOURCE_CHECK_EXCEPT && !denied)",
            "",
            "own rules that only allow cannot change what is allowed already: the test saves the look-up",
        ),
        (
            "network->source_check == SOURCE_CHECK_COMMON || ",
            "",
            "a network that asks only the common list has no prefixes of its own: the look-up finds nothing",
        ),
        ("? FEASIBLE_EVERYWHERE4 : FEASIBLE_EVERYWHERE6", "? FEASIBLE_EVERYWHERE6 : FEASIBLE_EVERYWHERE4"),
        ("if (network->feasible_everywhere & everywhere)", "if (0)"),
        ("if (network->feasible_everywhere & everywhere)", "if (network->feasible_everywhere)"),
        ("return dp_common4.lookup(&key4)", "return dp_sources4.lookup(&key4)"),
        ("return dp_common6.lookup(&key6)", "return dp_sources6.lookup(&key6)"),
        ("return (packet->destination[0] & network->vip4_mask) == network->vip4", "return 0"),
        ("(packet->destination[0] & network->vip4_mask)", "packet->destination[0]"),
        ("(packet->destination[i] & network->vip6_mask[i])", "packet->destination[i]"),
        ("for (i = 0; i < 4; i++)", "for (i = 0; i < 3; i++)"),
        ("return !differs", "return 0"),
        ("? MORE_VIPS4 : MORE_VIPS6", "? MORE_VIPS6 : MORE_VIPS4"),
        ("if (!(network->more_vips & more))", "if (1)"),
        (
            "if (!(network->more_vips & more))",
            "if (0)",
            "without more VIPs the trie has none of this network: the flag saves the look-up",
        ),
        ("return dp_vips4.lookup(&key4) != 0", "return dp_vips4.lookup(&key4) == 0"),
        ("return dp_vips6.lookup(&key6) != 0", "return 0"),
        ("return dp_feasible4.lookup(&key4)", "return dp_vips4.lookup(&key4)"),
        ("return dp_feasible6.lookup(&key6) != 0", "return 1"),
    ),
    *_of(
        "fib.h",
        (".ifindex = network->device_ifindex", ".ifindex = skb->ifindex"),
        ("lookup.ipv4_src = packet->destination[0];", ""),
        ("lookup.ipv4_dst = packet->source[0]", "lookup.ipv4_dst = packet->destination[0]"),
        ("__builtin_memcpy(lookup.ipv6_src, packet->destination, sizeof(lookup.ipv6_src));", ";"),
        ("lookup.ipv6_dst, packet->source", "lookup.ipv6_dst, packet->destination"),
        ("case BPF_FIB_LKUP_RET_NO_NEIGH:", ""),
        ("case BPF_FIB_LKUP_RET_FRAG_NEEDED:", ""),
        ("lookup.ifindex == network->device_ifindex ?", "lookup.ifindex != network->device_ifindex ?"),
        ("case BPF_FIB_LKUP_RET_UNSUPP_LWT:\n\t\treturn REVERSE_PATH_OTHER;", ""),
        ("return REVERSE_PATH_UNKNOWN", "return REVERSE_PATH_NONE"),
        ("return REVERSE_PATH_NONE", "return REVERSE_PATH_OTHER"),
        (" || path == REVERSE_PATH_UNKNOWN", ""),
    ),
    *_of(
        "verdict.h",
        ("return network->check_martians || ", "return "),
        (" || network->other_check;", ";"),
        (" || is_feasible(network, packet)", ""),
        ("network->vip_check == VIP_CHECK_OFF || ", ""),
        ("return VERDICT_VIP_UNREACHABLE", "return VERDICT_PASS"),
        ("VERDICT_PASS : VERDICT_VIP_STRICT", "VERDICT_PASS : VERDICT_RPF_STRICT"),
        ("VERDICT_PASS : VERDICT_RPF_STRICT", "VERDICT_PASS : VERDICT_PASS"),
        ("network->other_check == OTHER_CHECK_OFF", "0"),
        ("other_check == OTHER_CHECK_LOOSE", "other_check == OTHER_CHECK_STRICT"),
        ("path == REVERSE_PATH_NONE ?", "path != REVERSE_PATH_DEVICE ?"),
        ("if (is_link_traffic(cursor, packet))", "if (0)"),
        ("network->check_martians && is_martian", "is_martian"),
        ("network->source_check && is_spoofed", "is_spoofed"),
        ("return VERDICT_MARTIAN", "return VERDICT_SPOOFED"),
        ("if (is_to_all_on_link(packet))", "if (0)"),
        ("verdict != VERDICT_PASS && is_dhcp_answer(cursor, packet)", "0"),
        ("is_vip(network, packet) ?", "!is_vip(network, packet) ?"),
        (
            "if (!network->vip_check && !network->other_check)",
            "if (0)",
            "both checks pass everything when they are off; the early return saves the VIP look-up",
        ),
    ),
)

_ENTRY: Final = (
    *_of(
        "mark.h",
        ("skb->mark & ~(__u32)FWMARK_MASK", "0"),
        ("skb->mark & ~(__u32)FWMARK_MASK", "skb->mark"),
        ("fwmark & (__u32)FWMARK_MASK", "fwmark"),
    ),
    *_of(
        "counters.h",
        ("packets += packet_segments(skb)", "packets += 1"),
        ("bytes += skb->len", "bytes += 1"),
        ("&slot)", "&(__u32){ 0 })"),
    ),
    *_of(
        "drops.h",
        ("now >= control->until_ns", "0"),
        ("*time = now = bpf_ktime_get_ns()", "now = bpf_ktime_get_ns()"),
        ("event.source_port = ports.source", "event.source_port = ports.destination"),
        ("event.destination_port = ports.destination;", ""),
        (
            " || !control->until_ns",
            "",
            "a time of 0 is past, whatever the clock says: the test saves reading it",
        ),
        ("window->samples++ < control->per_second", "window->samples++ <= control->per_second"),
        ("window->samples++ < control->per_second", "1"),
        ("now - window->start_ns >= NS_PER_SECOND", "0"),
        ("event.source, packet->source", "event.source, packet->destination"),
        (".slot = slot", ".slot = 0"),
    ),
    *_of(
        "ingress.bpf.c",
        ("if (!is_checked(network))", "if (0)"),
        ("frame->ethertype == ETH_P_IP)", "frame->ethertype != ETH_P_IP)"),
        (
            "well_formed ? check(skb, cursor, network, packet) : VERDICT_MALFORMED",
            "check(skb, cursor, network, packet)",
        ),
        (": VERDICT_MALFORMED;", ": VERDICT_PASS;"),
        ("if (!find_network(skb, &guarded))\n\t\treturn TC_ACT_UNSPEC;", ""),
        (
            "read_known_frame(skb, &cursor, &frame) ? FRAME_OK : ",
            "",
            "every frame can be read, which says the same: the kernel's EtherType saves that",
        ),
        ("return guard(skb)", "return TC_ACT_UNSPEC"),
        ("!is_ip(&frame)", "0"),
        ("count(skb, network->slot, verdict)", "count(skb, network->slot, VERDICT_PASS)"),
        ("verdict != VERDICT_PASS", "verdict > VERDICT_MALFORMED"),
        ("if (network->fwmark)\n", ""),
    ),
)

_STEERING: Final = (
    *_of(
        "steering.bpf.c",
        ("if (skb->vlan_present)", "if (0)"),
        ("skb->protocol == BE16(ETH_P_IP))", "1)"),
        ("skb->protocol == BE16(ETH_P_IPV6))", "1)"),
        ("offsetof(struct iphdr, saddr)", "offsetof(struct iphdr, check)"),
        ("offsetof(struct ipv6hdr, saddr)", "offsetof(struct ipv6hdr, hop_limit)"),
        (
            "network->ifindex == skb->ifindex || is_passed4(index, &addresses)",
            "is_passed4(index, &addresses)",
        ),
        (
            "network->ifindex == skb->ifindex || is_passed6(index, &addresses)",
            "is_passed6(index, &addresses)",
        ),
        ("|| is_passed4(index, &addresses)", ""),
        ("|| is_passed6(index, &addresses)", ""),
    ),
    *_of(
        "steering_index.h",
        ("builtin_clzll(INDEX_CAPACITY) + 1", "builtin_clzll(INDEX_CAPACITY)"),
        ("addresses->source & index->mask4", "addresses->source"),
        ("addresses->source[i] & index->mask6[i]", "addresses->source[i]"),
        ("(first_half(masked) * index->multiplier6 ^", "(first_half(masked) ^"),
        ("^ first_half(masked + 2))", "^ first_half(masked))"),
        ("if (index->state4 == INDEX_OFF)\n\t\treturn search_network4(addresses)", "if (0)\n\t\treturn 0"),
        ("if (index->state6 == INDEX_OFF)\n\t\treturn search_network6(addresses)", "if (0)\n\t\treturn 0"),
        ("indexed->address == masked && ", ""),
        ("!differs && ", ""),
        ("indexed->address == masked && indexed->network.ifindex", "indexed->address == masked"),
        ("!differs && indexed->network.ifindex", "!differs"),
        ("indexed->ask_trie || index->state4 == INDEX_PART", "index->state4 == INDEX_PART"),
        ("indexed->ask_trie || index->state6 == INDEX_PART", "index->state6 == INDEX_PART"),
        ("indexed->ask_trie || index->state4 == INDEX_PART", "indexed->ask_trie"),
        ("indexed->ask_trie || index->state6 == INDEX_PART", "indexed->ask_trie"),
        ("if (index->state4 == INDEX_OFF)\n\t\treturn 1", "if (0)\n\t\treturn 1"),
        ("if (index->state6 == INDEX_OFF)\n\t\treturn 1", "if (0)\n\t\treturn 1"),
        ("(destination & index->passed4[i].mask)", "destination"),
        ("(destination & index->passed6[i].mask)", "destination"),
        ("may_be_passed4(index, addresses->destination) && is", "is"),
        ("may_be_passed6(index, first_half(addresses->destination)) && is", "is"),
        ("&& is_target4(SLOT_NONE, addresses)", ""),
        ("&& is_target6(SLOT_NONE, addresses)", ""),
    ),
    *_of(
        "steer.h",
        (".prefix_length = 32, .address", ".prefix_length = 31, .address"),
        (".prefix_length = 128 }", ".prefix_length = 127 }"),
        (".address = addresses->source }", ".address = addresses->destination }"),
        ("key.address, addresses->source", "key.address, addresses->destination"),
        (".prefix_length = SLOT_BITS + 32", ".prefix_length = SLOT_BITS + 24"),
        (".prefix_length = SLOT_BITS + 128", ".prefix_length = SLOT_BITS + 96"),
        ("return dp_targets4.lookup(&key) != 0", "return dp_targets4.lookup(&key) == 0"),
        ("return dp_targets6.lookup(&key) != 0", "return dp_targets6.lookup(&key) == 0"),
        ("if (is_on_link4(network, addresses))", "if (0)"),
        ("if (is_on_link6(network, addresses))", "if (0)"),
        ("& network->link_mask))", "& 0x00ffffff))"),
        ("& network->link_mask[i]", ""),
        ("network->more_links && is_target4(network->slot, addresses)", "0"),
        ("network->more_links && is_target6(network->slot, addresses)", "0"),
        (".nh_family = AF_INET_NUMBER, .ipv4_nh", ".nh_family = AF_INET6_NUMBER, .ipv4_nh"),
        (".nh_family = AF_INET6_NUMBER }", ".nh_family = AF_INET_NUMBER }"),
        ("counter->packets += packet_segments(skb)", "counter->packets += 1"),
        ("counter->bytes += skb->len", "counter->bytes += 1"),
    ),
)

MUTANTS: Final = (*_PARSER, *_SCOPE, *_POLICY, *_ENTRY, *_STEERING)
