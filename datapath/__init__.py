# SPDX-License-Identifier: Apache-2.0
"""Replies leave by the network their requests came in on."""

__version__ = "0.1.0"
