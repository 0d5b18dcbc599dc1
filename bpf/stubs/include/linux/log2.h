/* SPDX-License-Identifier: GPL-2.0-only */
/* Empty: only tracing programs need what bcc looks for here. */
