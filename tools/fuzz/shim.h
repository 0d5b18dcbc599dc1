// SPDX-License-Identifier: Apache-2.0
/*
 * What bcc and the kernel give bpf/ingress.bpf.c, natively: helpers, maps and one packet at a time.
 *
 * Contents of maps and routes come from world.h, which tools/fuzz/world.py writes. A packet is a heap allocation of
 * exactly its size, so AddressSanitizer sees each byte read past its end, and a struct on the program's stack ends
 * where it ends for a load, too.
 */
#ifndef SHIM_H
#define SHIM_H

#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "world.h"

#define require(condition)                                                                                   \
	do {                                                                                                 \
		if (!(condition)) {                                                                          \
			fprintf(stderr, "INVARIANT %s:%d: %s\n", __FILE__, __LINE__, #condition);            \
			abort();                                                                             \
		}                                                                                            \
	} while (0)

struct shim_packet {
	unsigned char *data;
	size_t size;
};

static struct shim_packet shim_packet;

/* As the kernel's: all or nothing, and zeroes where it fails. Inlined, an overflow of `to` could be optimised away. */
static __attribute__((noinline)) long bpf_skb_load_bytes(const void *skb, __u32 offset, void *to, __u32 size)
{
	(void)skb;
	/* The contract of cursor.h: offsets never leave the packet, whatever the length fields say. */
	require(offset <= shim_packet.size);
	if (offset > 0xffff || size > shim_packet.size - offset) {
		memset(to, 0, size);
		return -14;
	}
	memcpy(to, shim_packet.data + offset, size);
	return 0;
}

static __u64 bpf_ktime_get_ns(void)
{
	return 1;
}

static _Bool shim_bits_equal(const unsigned char *left, const unsigned char *right, unsigned int bits)
{
	unsigned int rest = bits % 8;

	if (memcmp(left, right, bits / 8) != 0)
		return 0;
	return rest == 0 || (left[bits / 8] >> (8 - rest)) == (right[bits / 8] >> (8 - rest));
}

static const struct shim_rows *shim_rows(const char *map)
{
	for (size_t i = 0; i < sizeof(shim_all_rows) / sizeof(shim_all_rows[0]); i++) {
		if (strcmp(shim_all_rows[i].map, map) == 0)
			return &shim_all_rows[i];
	}
	return 0;
}

static const void *shim_hash_lookup(const char *map, const void *key, size_t key_size, size_t value_size)
{
	const struct shim_rows *rows = shim_rows(map);

	for (size_t i = 0; rows && i < rows->count; i++) {
		const unsigned char *row = rows->bytes + i * (key_size + value_size);

		if (memcmp(row, key, key_size) == 0)
			return row + key_size;
	}
	return 0;
}

static const void *shim_trie_lookup(const char *map, const void *key, size_t key_size, size_t value_size)
{
	const struct shim_rows *rows = shim_rows(map);
	const unsigned char *best = 0;
	__u32 wanted, length, longest = 0;

	memcpy(&wanted, key, sizeof(wanted));
	require(wanted == (key_size - sizeof(wanted)) * 8);
	for (size_t i = 0; rows && i < rows->count; i++) {
		const unsigned char *row = rows->bytes + i * (key_size + value_size);

		memcpy(&length, row, sizeof(length));
		if (length >= longest &&
		    shim_bits_equal(row + sizeof(length), (const unsigned char *)key + sizeof(length), length)) {
			best = row + key_size;
			longest = length;
		}
	}
	return best;
}

/* Methods of bcc's maps are members that point to functions. Arrays have storage, a hash has the rows of world.h. */
#define BPF_TABLE(kind, key_type, value_type, name, capacity)                                                \
	static value_type storage_##name[capacity];                                                          \
	static value_type *lookup_##name(const key_type *key)                                                \
	{                                                                                                    \
		__u32 index;                                                                                 \
                                                                                                             \
		if (strcmp(kind, "hash") == 0)                                                               \
			return (value_type *)shim_hash_lookup(#name, key, sizeof(*key), sizeof(value_type)); \
		memcpy(&index, key, sizeof(index));                                                          \
		return index < (capacity) ? &storage_##name[index] : 0;                                      \
	}                                                                                                    \
	static const struct {                                                                                \
		value_type *(*lookup)(const key_type *);                                                     \
	} name = { lookup_##name }

#define BPF_F_TABLE(kind, key_type, value_type, name, capacity, flags)                                       \
	static value_type *lookup_##name(const key_type *key)                                                \
	{                                                                                                    \
		return (value_type *)shim_trie_lookup(#name, key, sizeof(*key), sizeof(value_type));         \
	}                                                                                                    \
	static const struct {                                                                                \
		value_type *(*lookup)(const key_type *);                                                     \
	} name = { lookup_##name }

static unsigned int shim_samples;
static unsigned char shim_sample[256];

static int shim_output(const void *data, __u64 size, __u64 flags)
{
	require(size <= sizeof(shim_sample) && flags == 0);
	memcpy(shim_sample, data, size);
	shim_samples++;
	return 0;
}

#define BPF_RINGBUF_OUTPUT(name, pages)                                                                      \
	static const struct {                                                                                \
		int (*ringbuf_output)(const void *, __u64, __u64);                                           \
	} name = { shim_output }

/* The kernel's rt6_need_strict: such addresses are not looked up. */
static _Bool shim_needs_strict(const void *address)
{
	static const unsigned char loopback[16] = { [15] = 1 };
	const unsigned char *bytes = address;

	return bytes[0] == 0xff || (bytes[0] == 0xfe && (bytes[1] & 0xc0) == 0x80) ||
	       memcmp(bytes, loopback, sizeof(loopback)) == 0;
}

static long bpf_fib_lookup(const void *skb, struct bpf_fib_lookup *lookup, int size, __u32 flags)
{
	const unsigned char *wanted = (const unsigned char *)lookup->ipv6_dst;
	const struct shim_route *best = 0;

	(void)skb;
	require(size == sizeof(*lookup) && flags == 0);
	require(lookup->family == 2 || lookup->family == 10);
	if (lookup->family == 10 && (shim_needs_strict(lookup->ipv6_src) || shim_needs_strict(lookup->ipv6_dst)))
		return BPF_FIB_LKUP_RET_NOT_FWDED;
	if (lookup->family == 2)
		wanted = (const unsigned char *)&lookup->ipv4_dst;
	for (size_t i = 0; i < sizeof(shim_routes) / sizeof(shim_routes[0]); i++) {
		const struct shim_route *route = &shim_routes[i];

		if (route->family == lookup->family && (!best || route->length >= best->length) &&
		    shim_bits_equal(route->address, wanted, route->length))
			best = route;
	}
	if (!best)
		return BPF_FIB_LKUP_RET_NOT_FWDED;
	if (best->ifindex)
		lookup->ifindex = best->ifindex;
	return best->result;
}

#endif
