// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the benchmark sends, reflects and counts. All of it runs in softirq on one CPU, in the loop of one
 * BPF_PROG_TEST_RUN with live frames: no socket, no wake-up and no copy is measured by accident.
 *
 * Built by tools/bench/programs.py; `struct flow_config` is also described in tools/bench/frames.py, which checks its size.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>

#define SEC(name) __attribute__((section(name), used))
#define FIELD_INT(name, value) int(*name)[value]
#define FIELD_TYPE(name, type_of) typeof(type_of) *name

static void *(*map_lookup)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*load_bytes)(const void *skb, __u32 offset, void *to, __u32 length) = (void *)BPF_FUNC_skb_load_bytes;
static long (*redirect)(__u32 ifindex, __u64 flags) = (void *)BPF_FUNC_redirect;

/* Last four bytes of each of our frames: what else the kernel sends on these devices is not counted. */
#define MAGIC 0x64706e21

#define WORDS 8
#define ETHERTYPE_IPV4 0x0008 /* as it lies in memory of a little-endian machine */

enum place { AT_CLIENT, AT_POD, AT_DEFAULT, AT_NODE, PLACES };

/* How to write frame number `next`: the head of flow 0, and the 16-bit words that differ by flow. */
struct flow_config {
	__u64 head[WORDS];
	__u32 is_ipv6;
	__u32 flow_mask;
	__u32 source_mask;
	__u32 destination_mask;
	__u32 identity_offset; /* source port or ICMP id */
	__u32 checksum_offset; /* of ICMP; 0: UDP without a checksum */
	__u32 is_reflected;
	__u32 next;
};

struct {
	FIELD_INT(type, BPF_MAP_TYPE_ARRAY);
	FIELD_INT(max_entries, 1);
	FIELD_TYPE(key, __u32);
	FIELD_TYPE(value, struct flow_config);
} flow_config SEC(".maps");

struct {
	FIELD_INT(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	FIELD_INT(max_entries, PLACES);
	FIELD_TYPE(key, __u32);
	FIELD_TYPE(value, __u64);
} arrived SEC(".maps");

static __inline __u16 swapped(__u16 value)
{
	return __builtin_bswap16(value);
}

/* One's complement sums do not care for byte order, so words are added as they lie in memory. */
static __inline __u16 checksum_plus(__u16 checksum, __u32 added)
{
	__u32 sum = (__u16)~checksum + added;

	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

static __inline __u16 add_word(void *at, __u16 more)
{
	__u16 before = *(__u16 *)at;

	*(__u16 *)at = swapped(swapped(before) + more);
	return swapped(more);
}

SEC("xdp") int generate(struct xdp_md *context)
{
	__u8 *data = (void *)(long)context->data, *end = (void *)(long)context->data_end;
	struct flow_config *config;
	__u32 key = 0, flow, words;

	config = map_lookup(&flow_config, &key);
	if (!config || data + 70 > end) {
		if (!config || data + 60 > end || config->is_ipv6)
			return XDP_DROP;
	}
	flow = config->next++ & config->flow_mask;
#pragma unroll
	for (int word = 0; word < 6; word++)
		((__u64 *)data)[word] = config->head[word];
	if (config->is_ipv6) {
		if (data + 70 > end)
			return XDP_DROP;
		((__u64 *)data)[6] = config->head[6];
		((__u64 *)data)[7] = config->head[7];
		words = add_word(data + 36, flow & config->source_mask);
		words += add_word(data + 52, flow & config->destination_mask);
	} else {
		words = add_word(data + 28, flow & config->source_mask);
		words += add_word(data + 32, flow & config->destination_mask);
		*(__u16 *)(data + 24) = checksum_plus(*(__u16 *)(data + 24), words);
		words = 0; /* ICMP of IPv4 has no pseudo header */
	}
	if (config->identity_offset == 34)
		words += add_word(data + 34, flow);
	else if (config->identity_offset == 38)
		words += add_word(data + 38, flow);
	else if (config->identity_offset == 54 && data + 70 <= end)
		words += add_word(data + 54, flow);
	else if (config->identity_offset == 58 && data + 70 <= end)
		words += add_word(data + 58, flow);
	if (config->checksum_offset == 36)
		*(__u16 *)(data + 36) = checksum_plus(*(__u16 *)(data + 36), words);
	else if (config->checksum_offset == 56 && data + 70 <= end)
		*(__u16 *)(data + 56) = checksum_plus(*(__u16 *)(data + 56), words);
	return XDP_PASS;
}

/* Makes a veth register the receive queue that live frames claim to come from. */
SEC("xdp") int accept(struct xdp_md *context)
{
	return XDP_PASS;
}

static __inline _Bool is_counted(struct __sk_buff *skb, __u32 place)
{
	__u32 last = 0;
	__u64 *count;

	if (load_bytes(skb, skb->len - sizeof(last), &last, sizeof(last)) || last != MAGIC)
		return 0;
	count = map_lookup(&arrived, &place);
	if (count)
		*count += 1;
	return 1;
}

SEC("tc") int client(struct __sk_buff *skb)
{
	return is_counted(skb, AT_CLIENT) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

SEC("tc") int default_gateway(struct __sk_buff *skb)
{
	return is_counted(skb, AT_DEFAULT) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

/* The floor of the harness itself: instead of a node. */
SEC("tc") int node(struct __sk_buff *skb)
{
	return is_counted(skb, AT_NODE) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

static __inline void exchange(__u32 *one, __u32 *other)
{
	__u32 kept = *one;

	*one = *other;
	*other = kept;
}

static __inline void exchange_ports(__u16 *ports)
{
	__u16 kept = ports[0];

	ports[0] = ports[1];
	ports[1] = kept;
}

SEC("tc") int pod(struct __sk_buff *skb)
{
	__u8 *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct flow_config *config;
	__u16 *mac = (__u16 *)data;
	__u32 key = 0;

	if (!is_counted(skb, AT_POD))
		return TC_ACT_UNSPEC;
	config = map_lookup(&flow_config, &key);
	if (!config || !config->is_reflected || data + 60 > end)
		return TC_ACT_SHOT;
#pragma unroll
	for (int word = 0; word < 3; word++) {
		__u16 kept = mac[word];

		mac[word] = mac[word + 3];
		mac[word + 3] = kept;
	}
	if (mac[6] == ETHERTYPE_IPV4) {
		exchange((__u32 *)(data + 26), (__u32 *)(data + 30));
		exchange_ports((__u16 *)(data + 34));
	} else {
		if (data + 70 > end)
			return TC_ACT_SHOT;
#pragma unroll
		for (int word = 0; word < 4; word++)
			exchange((__u32 *)(data + 22) + word, (__u32 *)(data + 38) + word);
		exchange_ports((__u16 *)(data + 54));
	}
	return redirect(skb->ifindex, 0);
}

/* What a tc program costs that does nothing, for comparison. */
SEC("tc") int nothing(struct __sk_buff *skb)
{
	return TC_ACT_UNSPEC;
}

char license_of_all[] SEC("license") = "GPL";
