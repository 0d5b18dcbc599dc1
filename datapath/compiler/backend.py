# SPDX-License-Identifier: Apache-2.0
"""Who looks at packets as they enter: the eBPF program, or nftables where it cannot be loaded."""

from __future__ import annotations

from datapath.compiler.context import Context
from datapath.errors import CompileError, Problem
from datapath.plan.ingress import IngressProgram
from datapath.plan.model import Backend
from datapath.policy.model import Backend as Wish


def choose_backend(context: Context, program: IngressProgram) -> tuple[Backend, str]:
    """The backend, and why it is this one.

    Raises:
        CompileError: the policy demands eBPF and this host refuses it.
    """
    wish, refused = context.policy.backend, context.facts.ebpf_refused
    if not program.networks:
        return Backend.NONE, "no packet has to be looked at"
    if wish is Wish.NFT:
        return Backend.NFT, "the policy asks for it"
    if not refused:
        return Backend.EBPF, "the policy asks for it" if wish is Wish.EBPF else "this host can load it"
    if wish is Wish.EBPF:
        raise CompileError(
            (
                Problem(
                    ("backend",),
                    f"this host cannot load the eBPF program: {refused}",
                    "backend: auto falls back to nftables, with the same verdicts",
                ),
            )
        )
    return Backend.NFT, f"this host cannot load the eBPF program: {refused}"
