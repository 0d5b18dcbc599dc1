/* SPDX-License-Identifier: GPL-2.0-only */
/* Samples of dropped packets for whoever is watching; rate-limited, and free while nobody does. */
#ifndef DATAPATH_DROPS_H
#define DATAPATH_DROPS_H

#include "ip.h"
#include "maps.h"

#define NS_PER_SECOND 1000000000ull

/* `*now` is read only where there was a reader at all: the clock is half of what a drop costs. */
static __always_inline _Bool may_sample(__u64 *time)
{
	__u32 zero = 0;
	struct drop_control *control = dp_drop_control.lookup(&zero);
	struct drop_window *window;
	__u64 now;

	if (!control || !control->until_ns)
		return 0;
	*time = now = bpf_ktime_get_ns();
	if (now >= control->until_ns)
		return 0;
	window = dp_drop_window.lookup(&zero);
	if (!window)
		return 0;
	if (now - window->start_ns >= NS_PER_SECOND) {
		window->start_ns = now;
		window->samples = 0;
	}
	return window->samples++ < control->per_second;
}

static __always_inline void sample_drop(struct __sk_buff *skb, __u16 slot, enum verdict verdict,
					const struct cursor *cursor, const struct ip_packet *packet)
{
	struct drop_event event = {
		.ifindex = skb->ifindex,
		.slot = slot,
		.verdict = verdict,
		.version = packet->version,
		.protocol = packet->protocol,
	};
	struct ports ports;

	if (!may_sample(&event.time_ns))
		return;
	ports = read_ports(cursor, packet);
	event.source_port = ports.source;
	event.destination_port = ports.destination;
	__builtin_memcpy(event.source, packet->source, sizeof(event.source));
	__builtin_memcpy(event.destination, packet->destination, sizeof(event.destination));
	dp_drops.ringbuf_output(&event, sizeof(event), 0);
}

#endif
