# SPDX-License-Identifier: Apache-2.0
"""The namespace lab: real traffic between namespaces that look like a node and its surroundings."""

from tools.lab.cells import Cell, Proto, Way, elsewhere_cells, inside_cells, matrix, same_ports, vlan_cells
from tools.lab.dnat import Dnat
from tools.lab.lab import Lab, RpFilter
from tools.lab.netns import LabError, Namespace
from tools.lab.probe import ProbeResult, probe_all
from tools.lab.topology import VIP_BACKENDS, Backend, Network, network

__all__ = [
    "VIP_BACKENDS",
    "Backend",
    "Cell",
    "Dnat",
    "Lab",
    "LabError",
    "Namespace",
    "Network",
    "ProbeResult",
    "Proto",
    "RpFilter",
    "Way",
    "elsewhere_cells",
    "inside_cells",
    "matrix",
    "network",
    "probe_all",
    "same_ports",
    "vlan_cells",
]
