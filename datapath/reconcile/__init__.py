# SPDX-License-Identifier: Apache-2.0
"""Pure: (actual, desired) -> ordered steps. Nothing here reads or writes a kernel."""
