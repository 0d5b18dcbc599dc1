# SPDX-License-Identifier: Apache-2.0
"""What the datapath does: counters, status, drops, and the reference model of the verdict."""
