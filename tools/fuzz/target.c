// SPDX-License-Identifier: Apache-2.0
/*
 * The fuzz target: what must be true of every frame, whatever the policy says.
 *
 * Verdicts as such are compared with the reference model afterwards (replay.c); this looks for reads out of
 * bounds, undefined behaviour, writes outside the mark's mask, and bytes behind the IP packet that change its verdict.
 */
#include "run.h"

struct ip_extent {
	size_t start;
	size_t end;       /* as the length field says; 0 if it says nothing */
	_Bool malformed; /* surely; false may still be a malformed chain of extension headers */
};

static __u16 be16_at(const struct input *input, size_t offset)
{
	return (__u16)(input->frame[offset] << 8 | input->frame[offset + 1]);
}

/* Written from the RFCs and not from bpf/: false if there is no IP packet. */
static _Bool find_ip(const struct input *input, struct ip_extent *extent)
{
	size_t type = 12, left, length, words;
	const unsigned char *ip;

	while (type + 2 <= input->size && (be16_at(input, type) == 0x8100 || be16_at(input, type) == 0x88a8))
		type += 4;
	if (type + 2 > input->size || (be16_at(input, type) != 0x0800 && be16_at(input, type) != 0x86dd))
		return 0;
	*extent = (struct ip_extent){ .start = type + 2, .malformed = 1 };
	left = input->size - extent->start;
	ip = input->frame + extent->start;
	if (be16_at(input, type) == 0x0800) {
		if (left < 20)
			return 1;
		length = be16_at(input, extent->start + 2);
		words = ip[0] & 15;
		if (length == 0 && input->segments > 1)
			extent->malformed = ip[0] >> 4 != 4 || words < 5 || left < words * 4;
		else
			extent->malformed = ip[0] >> 4 != 4 || words < 5 || length < words * 4 || length > left;
	} else {
		if (left < 40)
			return 1;
		length = be16_at(input, extent->start + 4);
		extent->malformed = ip[0] >> 4 != 6 || length > left - 40;
		length += length ? 40 : 0;
	}
	extent->end = length ? extent->start + length : 0;
	return 1;
}

static _Bool is_checked_network(const struct input *input, const struct outcome *outcome)
{
	struct network_key key = { .ifindex = input->ifindex };
	const struct shim_rows *rows = shim_rows("dp_networks");

	for (size_t i = 0; i < rows->count; i++) {
		const unsigned char *row = rows->bytes + i * (sizeof(key) + sizeof(struct network));
		const struct network *network = (const struct network *)(row + sizeof(key));

		if (network->slot == outcome->slot)
			return network->check_martians || network->source_check || network->vip_check ||
			       network->other_check;
	}
	return 0;
}

static void check_outcome(const struct input *input, const struct outcome *outcome)
{
	require(outcome->action == TC_ACT_UNSPEC || outcome->action == TC_ACT_SHOT);
	require(((outcome->mark ^ input->mark) & ~(__u32)FWMARK_MASK) == 0);
	if (outcome->action == TC_ACT_SHOT) {
		require(outcome->slot >= 0 && outcome->verdict != VERDICT_PASS);
		require(outcome->mark == input->mark);
		require(outcome->samples == 1 && outcome->sample.verdict == outcome->verdict);
		require(outcome->sample.slot == outcome->slot && outcome->sample.ifindex == input->ifindex);
	} else {
		require(outcome->samples == 0);
		require(outcome->slot != 0);
		require(outcome->slot < 0 || outcome->verdict == VERDICT_PASS);
		require(outcome->slot >= 0 || outcome->mark == input->mark);
	}
	if (outcome->slot >= 0) {
		require(outcome->counted.packets == (input->segments ? input->segments : 1));
		require(outcome->counted.bytes == input->size);
	}
}

static void require_same(const struct outcome *left, const struct outcome *right)
{
	require(left->action == right->action && left->mark == right->mark);
	require(left->slot == right->slot && left->verdict == right->verdict);
	require(memcmp(&left->sample, &right->sample, sizeof(left->sample)) == 0);
}

/* What lies behind the IP packet (Ethernet padding, a trailer) changes nothing, and neither does its absence. */
static void check_trailer(const struct input *input, const struct ip_extent *extent, const struct outcome *outcome)
{
	unsigned char *copy = malloc(input->size);
	struct input changed = *input;
	struct outcome other;

	require(copy);
	memcpy(copy, input->frame, input->size);
	for (size_t i = extent->end; i < input->size; i++)
		copy[i] = (unsigned char)~copy[i];
	changed.frame = copy;
	other = run(&changed);
	require_same(outcome, &other);
	changed.size = extent->end;
	other = run(&changed);
	require_same(outcome, &other);
	free(copy);
}

static void check_extent(const struct input *input, const struct ip_extent *extent, const struct outcome *outcome)
{
	struct input cut = *input;
	struct outcome other;

	if (extent->malformed) {
		require(outcome->verdict == VERDICT_MALFORMED);
		return;
	}
	if (be16_at(input, extent->start - 2) == 0x0800)
		require(outcome->verdict != VERDICT_MALFORMED);
	if (!extent->end)
		return;
	if (extent->end < input->size)
		check_trailer(input, extent, outcome);
	cut.size = extent->end - 1;
	other = run(&cut);
	require(other.verdict == VERDICT_MALFORMED && other.slot == outcome->slot);
}

int LLVMFuzzerTestOneInput(const unsigned char *bytes, size_t size)
{
	struct ip_extent extent;
	struct outcome outcome;
	struct input input;

	if (!read_input(bytes, size, &input))
		return -1;
	outcome = run(&input);
	check_outcome(&input, &outcome);
	/* Slot 0: too many tags. Without checks nothing looks at the packet. */
	if (outcome.slot <= 0)
		return 0;
	require(find_ip(&input, &extent));
	if (is_checked_network(&input, &outcome))
		check_extent(&input, &extent, &outcome);
	else
		require(outcome.verdict == VERDICT_PASS);
	return 0;
}
