# SPDX-License-Identifier: Apache-2.0
"""The reading end of a BPF ring buffer, through libbpf."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING, Final

from datapath.errors import KernelError
from datapath.kernel.bpf.libbpf import check, library

if TYPE_CHECKING:
    from datapath.kernel.bpf.libbpf import Map

_SAMPLE_CALLBACK: Final = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class RingBuffer:
    """The reading end of a BPF_MAP_TYPE_RINGBUF map.

    Raises:
        KernelError: the kernel refused to map it.
    """

    def __init__(self, bpf_map: Map) -> None:
        self._samples: list[bytes] = []
        # libbpf keeps a plain pointer to the callback: it must live as long as the ring.
        self._callback = _SAMPLE_CALLBACK(self._keep)
        libbpf = library()
        libbpf.ring_buffer__new.restype = ctypes.c_void_p
        self._ring: int | None = libbpf.ring_buffer__new(bpf_map.fd.number, self._callback, None, None)
        if not self._ring:
            number = ctypes.get_errno()
            raise KernelError("map the ring buffer of drop samples", os.strerror(number), errno=number)

    def _keep(self, _context: int | None, data: int, size: int) -> int:
        self._samples.append(ctypes.string_at(data, size))
        return 0

    def fileno(self) -> int:
        """Readable while samples are there."""
        return int(library().ring_buffer__epoll_fd(ctypes.c_void_p(self._ring)))

    def poll(self, timeout_ms: int) -> list[bytes]:
        """Samples that are there, else those that come within the timeout.

        Raises:
            KernelError: polling failed. An interrupting signal is no failure.
        """
        result = library().ring_buffer__poll(ctypes.c_void_p(self._ring), timeout_ms)
        if result != -errno.EINTR:
            check("read drop samples", result)
        samples, self._samples = self._samples, []
        return samples

    def close(self) -> None:
        """Unmap it; again does nothing."""
        ring, self._ring = self._ring, None
        if ring:
            library().ring_buffer__free(ctypes.c_void_p(ring))
