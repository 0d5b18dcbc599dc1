/* SPDX-License-Identifier: GPL-2.0-only */
/* bcc puts this directory in front of the system headers: go on to them. */
#include_next <linux/if_packet.h>
