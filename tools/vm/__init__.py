# SPDX-License-Identifier: Apache-2.0
"""`make test-vm`: the tests marked `vm` on Debian's own kernels, each in one emulated boot."""
