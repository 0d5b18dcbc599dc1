# SPDX-License-Identifier: Apache-2.0
"""The desired state of a node in kernel terms. Frozen, sorted, printable; no ifindex anywhere."""
