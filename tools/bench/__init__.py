# SPDX-License-Identifier: Apache-2.0
"""Measurements: each prints figures and asserts nothing."""
