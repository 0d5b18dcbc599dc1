# SPDX-License-Identifier: Apache-2.0
"""The eBPF program built natively: fuzzed with sanitizers, and replayed against the reference model."""
