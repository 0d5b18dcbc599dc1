# SPDX-License-Identifier: Apache-2.0
"""The only code that touches the kernel. Everything works in the network namespace of the process."""
