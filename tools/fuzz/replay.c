// SPDX-License-Identifier: Apache-2.0
/*
 * Reads inputs from standard input, each after its size (16 bits, little endian); prints one line for each:
 * action, mark, slot and verdict ("- -" if not counted), packets, bytes, and the drop sample.
 */
#include "run.h"

static void print_address(const __be32 *address)
{
	const unsigned char *bytes = (const unsigned char *)address;

	for (int i = 0; i < 16; i++)
		printf("%02x", bytes[i]);
	putchar(' ');
}

static void print_sample(const struct drop_event *sample)
{
	printf("sample %u %u %u %u %u %u %u ", sample->ifindex, sample->slot, sample->verdict, sample->version,
	       sample->protocol, sample->source_port, sample->destination_port);
	print_address(sample->source);
	print_address(sample->destination);
}

static void print_outcome(const struct outcome *outcome)
{
	printf("%d %u ", outcome->action, outcome->mark);
	if (outcome->slot < 0)
		printf("- - ");
	else
		printf("%d %d ", outcome->slot, outcome->verdict);
	printf("%llu %llu ", outcome->counted.packets, outcome->counted.bytes);
	if (outcome->samples)
		print_sample(&outcome->sample);
	printf("%u\n", outcome->samples);
}

int main(void)
{
	static unsigned char bytes[0x10000];
	unsigned char header[2];
	struct outcome outcome;
	struct input input;
	size_t size;

	while (fread(header, 1, sizeof(header), stdin) == sizeof(header)) {
		size = header[0] | header[1] << 8;
		require(fread(bytes, 1, size, stdin) == size);
		require(read_input(bytes, size, &input));
		outcome = run(&input);
		print_outcome(&outcome);
	}
	return 0;
}
