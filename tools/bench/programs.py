# SPDX-License-Identifier: Apache-2.0
"""Builds, loads and attaches the benchmark's own eBPF programs (traffic.bpf.c), and runs them.

clang and libbpf, not bcc: the product's compiler process loads tc programs only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from datapath.kernel.bpf import libbpf
from tools import clang
from tools.clang import BuildError

_SOURCE: Final = Path(__file__).with_name("traffic.bpf.c")
_LIVE_FRAMES: Final = 1 << 1  # BPF_F_TEST_XDP_LIVE_FRAMES
_XDP_NATIVE: Final = 1 << 2  # XDP_FLAGS_DRV_MODE
_INGRESS: Final = 1  # BPF_TC_INGRESS
_EEXIST: Final = 17


class _XdpMd(ctypes.Structure):
    """`struct xdp_md`."""

    _fields_ = tuple(
        (name, ctypes.c_uint32)
        for name in ("data", "data_end", "data_meta", "ingress_ifindex", "rx_queue_index", "egress_ifindex")
    )


class _TcHook(ctypes.Structure):
    """`struct bpf_tc_hook`."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("ifindex", ctypes.c_int),
        ("attach_point", ctypes.c_int),
        ("parent", ctypes.c_uint32),
    )


class _TcOpts(ctypes.Structure):
    """`struct bpf_tc_opts`."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("prog_fd", ctypes.c_int),
        ("flags", ctypes.c_uint32),
        ("prog_id", ctypes.c_uint32),
        ("handle", ctypes.c_uint32),
        ("priority", ctypes.c_uint32),
    )


def build(directory: Path) -> Path:
    """Compile traffic.bpf.c.

    Raises:
        BuildError: it does not compile.
    """
    flags = ["-O2", "-g", "-mcpu=v3", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    flags += [f"-I/usr/include/{multiarch}"] if multiarch else []
    return clang.build(["-target", "bpf", *flags, "-c", str(_SOURCE)], directory / "traffic.o")


class Programs:
    """The loaded programs and maps; alive as long as this object."""

    def __init__(self, path: Path) -> None:
        library = libbpf.library()
        for function in (
            "bpf_object__open_file",
            "bpf_object__find_program_by_name",
            "bpf_object__find_map_by_name",
        ):
            getattr(library, function).restype = ctypes.c_void_p
        # Errors come back as exceptions; libbpf's own words on stderr would disturb the table.
        library.libbpf_set_print(None)
        self._library: Any = library
        opened = library.bpf_object__open_file(str(path).encode(), None)
        if not opened:
            raise BuildError(f"libbpf cannot read {path}")
        self._object = ctypes.c_void_p(opened)
        libbpf.check("load the benchmark's programs", library.bpf_object__load(self._object))
        self.config = self._map("flow_config")
        self.arrived = self._map("arrived")

    def close(self) -> None:
        """Unload what is attached nowhere."""
        self.config.close()
        self.arrived.close()
        self._library.bpf_object__close(self._object)

    def descriptor(self, name: str) -> int:
        """The program's file descriptor; not to be closed."""
        program = self._library.bpf_object__find_program_by_name(self._object, name.encode())
        if not program:
            raise BuildError(f"traffic.bpf.c has no program {name}")
        return int(self._library.bpf_program__fd(ctypes.c_void_p(program)))

    def owned(self, name: str) -> libbpf.OwnedFd:
        """A descriptor of its own, to be closed."""
        return libbpf.OwnedFd(os.dup(self.descriptor(name)))

    def _map(self, name: str) -> libbpf.Map:
        found = self._library.bpf_object__find_map_by_name(self._object, name.encode())
        if not found:
            raise BuildError(f"traffic.bpf.c has no map {name}")
        number = self._library.bpf_map__fd(ctypes.c_void_p(found))
        # The object closes its own descriptor.
        return libbpf.Map(libbpf.OwnedFd(os.dup(number)))

    def attach_xdp(self, name: str, ifindex: int) -> None:
        """Attach natively, in the calling thread's namespace."""
        result = self._library.bpf_xdp_attach(ifindex, self.descriptor(name), _XDP_NATIVE, None)
        libbpf.check(f"attach {name} to device {ifindex}", result)

    def detach_xdp(self, ifindex: int) -> None:
        """Without XDP a veth does segmentation offload again."""
        libbpf.check("detach", self._library.bpf_xdp_detach(ifindex, _XDP_NATIVE, None))

    def attach_tc(self, name: str, ifindex: int) -> None:
        """Attach at tc ingress, direct action, in the calling thread's namespace."""
        hook = _TcHook(sz=ctypes.sizeof(_TcHook), ifindex=ifindex, attach_point=_INGRESS)
        result = self._library.bpf_tc_hook_create(ctypes.byref(hook))
        if result != -_EEXIST:
            libbpf.check("create clsact", result)
        opts = _TcOpts(sz=ctypes.sizeof(_TcOpts), prog_fd=self.descriptor(name), handle=1, priority=1)
        result = self._library.bpf_tc_attach(ctypes.byref(hook), ctypes.byref(opts))
        libbpf.check(f"attach {name} to device {ifindex}", result)

    def send(self, frame: bytes, ifindex: int, count: int, batch: int) -> int:
        """Let `generate` write frames that come in by a device of the calling thread's namespace.

        Returns:
            the mean time of one frame in ns, by the kernel's clock around all that it caused in softirq.
        """
        context = _XdpMd(data_end=len(frame), ingress_ifindex=ifindex)
        data = ctypes.create_string_buffer(frame, len(frame))
        opts = libbpf.RunOpts(
            sz=ctypes.sizeof(libbpf.RunOpts),
            data_in=ctypes.addressof(data),
            data_size_in=len(frame),
            ctx_in=ctypes.addressof(context),
            ctx_size_in=ctypes.sizeof(context),
            repeat=count,
            flags=_LIVE_FRAMES,
            batch_size=batch,
        )
        result = self._library.bpf_prog_test_run_opts(self.descriptor("generate"), ctypes.byref(opts))
        libbpf.check("send live frames", result)
        return int(opts.duration)


@contextlib.contextmanager
def loaded() -> Iterator[Programs]:
    """Build, load, and unload in the end."""
    with tempfile.TemporaryDirectory(prefix="datapath-bench-") as name:
        programs = Programs(build(Path(name)))
        try:
            yield programs
        finally:
            programs.close()
