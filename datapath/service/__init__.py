# SPDX-License-Identifier: Apache-2.0
"""The daemon: applies the policy, watches its files and the kernel, and heals what drifts."""

from datapath.service.loop import run_service

__all__ = ["run_service"]
