# SPDX-License-Identifier: Apache-2.0
"""Samples of dropped packets, read from the program's ring buffer while somebody watches.

The reader writes into the program's control map until when it wants samples, and renews that; a reader
that dies is forgotten after `_LEASE_S`. One reader at a time: a ring buffer has one position.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Final, Self

from datapath.errors import ConflictError
from datapath.kernel.bpf import abi
from datapath.kernel.bpf.program import LoadedIngress
from datapath.kernel.bpf.ringbuf import RingBuffer
from datapath.kernel.devices import device_name
from datapath.plan.ingress import Verdict

if TYPE_CHECKING:
    from types import TracebackType

_LEASE_S: Final = 3.0
_NS_PER_S: Final = 1_000_000_000
_CONTROL_KEY: Final = (0).to_bytes(4, sys.byteorder)


@dataclass(frozen=True, slots=True)
class Drop:
    """One dropped packet.

    Attributes:
        time_ns: CLOCK_MONOTONIC.
        ifname: where the program saw it (the trunk), or the ifindex as text if it is gone.
        slot: of the network; 0 if the packet was dropped before its network was known.
        source: None if the header was malformed.
        source_port: 0 without ports.
    """

    time_ns: int
    ifname: str
    slot: int
    verdict: Verdict
    source: IPv4Address | IPv6Address | None
    destination: IPv4Address | IPv6Address | None
    protocol: int
    source_port: int
    destination_port: int


def _address(version: int, raw: bytes) -> IPv4Address | IPv6Address | None:
    if version == 0:
        return None
    return IPv4Address(raw[:4]) if version == 4 else IPv6Address(raw)


def _decode(raw: bytes) -> Drop:
    event = abi.DropEvent.from_buffer_copy(raw)
    return Drop(
        time_ns=event.time_ns,
        ifname=device_name(event.ifindex),
        slot=event.slot,
        verdict=Verdict(event.verdict),
        source=_address(event.version, bytes(event.source)),
        destination=_address(event.version, bytes(event.destination)),
        protocol=event.protocol,
        source_port=event.source_port,
        destination_port=event.destination_port,
    )


class DropReader:
    """Watches one attached program; a context manager.

    Args:
        program_id: of the attached program.
        per_second: most samples per second and CPU.

    Raises:
        ConflictError: somebody else is watching.
        KernelError: the program is gone.
    """

    def __init__(self, program_id: int, *, per_second: int = 100) -> None:
        self._per_second = per_second
        self._loaded = LoadedIngress.open(program_id)
        try:
            self._refuse_second_reader()
            self._start_ns = time.monotonic_ns()
            self._ring = RingBuffer(self._loaded.map(abi.MAP_DROPS))
            self._renew()
        except BaseException:
            self._loaded.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """Readable while samples are there."""
        return self._ring.fileno()

    def close(self) -> None:
        """Stop the sampling."""
        self._write_control(until_ns=0, reader=0)
        self._ring.close()
        self._loaded.close()

    def _refuse_second_reader(self) -> None:
        raw = self._loaded.map(abi.MAP_DROP_CONTROL).lookup(_CONTROL_KEY) or b""
        control = abi.DropControl.from_buffer_copy(raw)
        if control.until_ns > time.monotonic_ns() and control.reader != os.getpid():
            raise ConflictError(
                f"process {control.reader} is reading the dropped packets already", hint="stop that one first"
            )

    def _write_control(self, *, until_ns: int, reader: int) -> None:
        control = abi.DropControl(until_ns=until_ns, per_second=self._per_second, reader=reader)
        self._loaded.map(abi.MAP_DROP_CONTROL).update({_CONTROL_KEY: bytes(control)})

    def _renew(self) -> None:
        until = time.monotonic_ns() + int(_LEASE_S * _NS_PER_S)
        self._write_control(until_ns=until, reader=os.getpid())

    def poll(self, timeout_s: float) -> list[Drop]:
        """Samples that are there, or the first to come within the timeout (at most a lease at a time).

        To be called every second, or the sampling ends.
        """
        self._renew()
        wait_ms = int(min(timeout_s, _LEASE_S / 2) * 1000)
        # What an earlier reader left behind is older than this one.
        return [drop for drop in map(_decode, self._ring.poll(wait_ms)) if drop.time_ns >= self._start_ns]
