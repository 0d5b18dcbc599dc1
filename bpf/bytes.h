/* SPDX-License-Identifier: GPL-2.0-only */
/* Byte order. Plain C. */
#ifndef DATAPATH_BYTES_H
#define DATAPATH_BYTES_H

#include <linux/types.h>

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define BE16(x) ((__u16)__builtin_bswap16((__u16)(x)))
#define BE32(x) ((__u32)__builtin_bswap32((__u32)(x)))
#else
#define BE16(x) ((__u16)(x))
#define BE32(x) ((__u32)(x))
#endif

#endif
