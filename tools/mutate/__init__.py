# SPDX-License-Identifier: Apache-2.0
"""Changes single conditions of the eBPF program, one at a time, and shows which test notices each."""
