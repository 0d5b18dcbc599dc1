/* SPDX-License-Identifier: GPL-2.0-only */
/* The packet mark is shared with others: only bits inside FWMARK_MASK are ever written. */
#ifndef DATAPATH_MARK_H
#define DATAPATH_MARK_H

#include <linux/bpf.h>

static __always_inline void set_mark(struct __sk_buff *skb, __u32 fwmark)
{
	__u32 mark = (skb->mark & ~(__u32)FWMARK_MASK) | (fwmark & (__u32)FWMARK_MASK);

	/* LLVM makes a one-byte store of a one-byte mask, and the verifier refuses that on the context. */
	asm volatile("" : "+r"(mark));
	skb->mark = mark;
}

#endif
