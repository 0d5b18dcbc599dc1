/* SPDX-License-Identifier: GPL-2.0-only */
/* Empty: bcc carries its own copy of this header. */
