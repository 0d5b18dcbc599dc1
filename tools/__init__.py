# SPDX-License-Identifier: Apache-2.0
"""Tools around the product: the namespace lab, benchmarks, VM lane, dry-run reports."""
