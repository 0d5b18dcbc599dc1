/* SPDX-License-Identifier: GPL-2.0-only */
/* Samples of dropped packets for whoever is watching; rate-limited, and free while nobody does. */
#ifndef DATAPATH_DROPS_H
#define DATAPATH_DROPS_H

#include "ip.h"
#include "maps.h"

#define NS_PER_SECOND 1000000000ull

static __always_inline _Bool may_sample(__u64 now)
{
	__u32 zero = 0;
	struct drop_control *control = dp_drop_control.lookup(&zero);
	struct drop_window *window;

	if (!control || now >= control->until_ns)
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
					const struct ip_packet *packet)
{
	__u64 now = bpf_ktime_get_ns();
	struct drop_event event = {
		.time_ns = now,
		.ifindex = skb->ifindex,
		.slot = slot,
		.verdict = verdict,
		.version = packet->version,
		.protocol = packet->protocol,
		.source_port = packet->source_port,
		.destination_port = packet->destination_port,
	};

	if (!may_sample(now))
		return;
	__builtin_memcpy(event.source, packet->source, sizeof(event.source));
	__builtin_memcpy(event.destination, packet->destination, sizeof(event.destination));
	dp_drops.ringbuf_output(&event, sizeof(event), 0);
}

#endif
