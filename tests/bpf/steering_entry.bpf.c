// SPDX-License-Identifier: GPL-2.0-only
/*
 * The egress program under BPF_PROG_TEST_RUN. What it asks of bpf_redirect_neigh is written down instead of done. A tag in
 * the metadata comes in cb[0] (TPID, host order) and cb[1] (TCI), as in entry.bpf.c.
 */
#include <linux/bpf.h>

struct asked {
	__u32 ifindex;
	__u32 family;
	__u32 next_hop[4];
};

BPF_TABLE("array", __u32, struct asked, test_asked, 1);

static __always_inline long write_down(__u32 ifindex, struct bpf_redir_neigh *next_hop, int size, __u64 flags)
{
	__u32 zero = 0;
	struct asked *asked = test_asked.lookup(&zero);

	if (!asked || size != sizeof(*next_hop) || flags)
		return 2; /* TC_ACT_SHOT */
	asked->ifindex = ifindex;
	asked->family = next_hop->nh_family;
	__builtin_memcpy(asked->next_hop, next_hop->ipv6_nh, sizeof(asked->next_hop));
	return 7; /* TC_ACT_REDIRECT */
}
#define REDIRECT_NEIGH write_down

#include "steering.bpf.c"

int datapath_test(struct __sk_buff *skb)
{
	__u16 vlan_proto = skb->cb[0];

	if (vlan_proto)
		bpf_skb_vlan_push(skb, BE16(vlan_proto), skb->cb[1]);
	return steer(skb);
}
