// SPDX-License-Identifier: Apache-2.0
/* One input through the program. tools/fuzz/world.py has the same layout of an input. */
#ifndef RUN_H
#define RUN_H

#include "shim.h"

#include "ingress.bpf.c"

#define CONTROL_SIZE 7
#define FLAG_TAG 1
#define FLAG_DOT1AD 2
#define FLAG_MERGED 4
#define SEGMENTS 2

struct input {
	__u32 ifindex;
	__u32 mark;
	__u32 segments;
	__u16 vlan_proto; /* of the metadata tag; 0 without one */
	__u16 vlan_tci;
	const unsigned char *frame;
	size_t size;
};

struct outcome {
	int action;
	__u32 mark;
	int slot; /* -1: not counted */
	int verdict;
	struct counter counted;
	unsigned int samples;
	struct drop_event sample;
};

static _Bool read_input(const unsigned char *bytes, size_t size, struct input *input)
{
	if (size < CONTROL_SIZE)
		return 0;
	*input = (struct input){
		.ifindex = FIRST_IFINDEX + (bytes[0] >> 3) % IFINDEXES,
		.segments = bytes[0] & FLAG_MERGED ? SEGMENTS : 0,
		.frame = bytes + CONTROL_SIZE,
		.size = size - CONTROL_SIZE,
	};
	memcpy(&input->mark, bytes + 3, sizeof(input->mark));
	if (bytes[0] & FLAG_TAG) {
		input->vlan_proto = bytes[0] & FLAG_DOT1AD ? ETH_P_8021AD : ETH_P_8021Q;
		input->vlan_tci = (__u16)(bytes[1] << 8 | bytes[2]);
	}
	return 1;
}

static void read_counters(struct outcome *outcome)
{
	outcome->slot = -1;
	for (int slot = 0; slot < COUNTERS_CAPACITY; slot++) {
		for (int verdict = 0; verdict < VERDICT_COUNT; verdict++) {
			const struct counter *counter = &storage_dp_counters[slot].verdicts[verdict];

			if (!counter->packets && !counter->bytes)
				continue;
			require(outcome->slot == -1);
			outcome->slot = slot;
			outcome->verdict = verdict;
			outcome->counted = *counter;
		}
	}
}

/* As eth_type_trans leaves it. `data` and `data_end` stay 0: as if no byte were linear. */
static __be16 protocol(const struct input *input)
{
	__be16 ethertype = 0;

	if (input->size >= ETH_HLEN)
		memcpy(&ethertype, input->frame + ETH_ALEN * 2, sizeof(ethertype));
	return ethertype;
}

static struct outcome run(const struct input *input)
{
	struct __sk_buff skb = {
		.len = (__u32)input->size,
		.mark = input->mark,
		.ifindex = input->ifindex,
		.protocol = protocol(input),
		.gso_segs = input->segments,
		.vlan_present = input->vlan_proto != 0,
		.vlan_proto = BE16(input->vlan_proto),
		.vlan_tci = input->vlan_tci,
	};
	struct outcome outcome = {};

	memset(storage_dp_counters, 0, sizeof(storage_dp_counters));
	memset(storage_dp_drop_window, 0, sizeof(storage_dp_drop_window));
	storage_dp_drop_control[0] = (struct drop_control){ .until_ns = ~0ull, .per_second = 1 };
	shim_samples = 0;
	memset(shim_sample, 0, sizeof(shim_sample));
	shim_packet.size = input->size;
	shim_packet.data = malloc(input->size);
	require(shim_packet.data || !input->size);
	if (input->size)
		memcpy(shim_packet.data, input->frame, input->size);

	outcome.action = datapath_in(&skb);

	free(shim_packet.data);
	outcome.mark = skb.mark;
	outcome.samples = shim_samples;
	memcpy(&outcome.sample, shim_sample, sizeof(outcome.sample));
	read_counters(&outcome);
	return outcome;
}

#endif
