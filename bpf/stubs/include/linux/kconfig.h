/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Stands in for a kernel source tree, which bcc insists on (`BCC_KERNEL_SOURCE`) only to get the
 * basic types into its own prelude. Everything else comes from the system's UAPI headers
 * (linux-libc-dev), so no kernel headers are needed on the node.
 */
#ifndef DATAPATH_STUB_KCONFIG_H
#define DATAPATH_STUB_KCONFIG_H

#include <linux/types.h>

/* bcc 0.26 refuses to go on without it. */
#define CONFIG_BPF_SYSCALL 1

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s8 s8;
typedef __s16 s16;
typedef __s32 s32;
typedef __s64 s64;
typedef __SIZE_TYPE__ size_t;
typedef __UINTPTR_TYPE__ uintptr_t;
typedef _Bool bool;
enum { false, true };

#endif
