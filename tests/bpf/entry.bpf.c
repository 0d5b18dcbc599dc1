// SPDX-License-Identifier: GPL-2.0-only
/*
 * The program under BPF_PROG_TEST_RUN, which refuses `vlan_tci` in the context: the metadata tag comes in
 * cb[0] (TPID, host order) and cb[1] (TCI) and is pushed as a driver would have left it. It also refuses IP packets
 * shorter than their header: for those cb[2] has the EtherType and the frame another one.
 */
#include "ingress.bpf.c"

int datapath_test(struct __sk_buff *skb)
{
	__u16 vlan_proto = skb->cb[0];
	__be16 ethertype = BE16(skb->cb[2]);

	if (ethertype)
		bpf_skb_store_bytes(skb, 12, &ethertype, sizeof(ethertype), 0);
	if (vlan_proto)
		bpf_skb_vlan_push(skb, BE16(vlan_proto), skb->cb[1]);
	return ingress(skb);
}
