# SPDX-License-Identifier: Apache-2.0
"""The tc eBPF program: compiled with bcc in a child process, handled here through libbpf and tc."""

from datapath.kernel.bpf.drops import Drop, DropReader
from datapath.kernel.bpf.ingress import (
    ActualProgram,
    IngressDiff,
    IngressState,
    attach,
    attach_all,
    compare_ingress,
    detach,
    load_ingress,
    observe_ingress,
    read_counters,
    switch,
    update_entries,
    verify_ingress,
)
from datapath.kernel.bpf.loaded import Counter, ProgramMeta
from datapath.kernel.bpf.program import LoadedIngress, SlotCounters
from datapath.kernel.bpf.source import Capacities, desired_digest
from datapath.kernel.bpf.tables import IngressTables, NetworkEntry, PointKey, resolve

__all__ = [
    "ActualProgram",
    "Capacities",
    "Counter",
    "Drop",
    "DropReader",
    "IngressDiff",
    "IngressState",
    "IngressTables",
    "LoadedIngress",
    "NetworkEntry",
    "PointKey",
    "ProgramMeta",
    "SlotCounters",
    "attach",
    "attach_all",
    "compare_ingress",
    "desired_digest",
    "detach",
    "load_ingress",
    "observe_ingress",
    "read_counters",
    "resolve",
    "switch",
    "update_entries",
    "verify_ingress",
]
