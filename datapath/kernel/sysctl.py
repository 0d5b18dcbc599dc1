# SPDX-License-Identifier: Apache-2.0
"""Sysctls of the current network namespace, below /proc/sys."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from datapath.errors import KernelError

ROOT = Path("/proc/sys")
_IPV4_CONF = "net/ipv4/conf"
#: More than any value of these has.
_VALUE_BYTES = 4096
#: Read for every device: exempting one device from rp_filter touches all of them.
_PER_DEVICE = ("rp_filter",)
#: Read for `default`: what a VLAN device that we create will start with. All that a plan may set for a device.
_INHERITED = ("rp_filter", "arp_ignore", "arp_announce", "accept_local")


#: A device that we make and put into a VRF: what `keep_addr_on_down` it starts with.
NEW_DEVICES_KEEP_ADDRESSES = "net/ipv6/conf/default/keep_addr_on_down"


def read(key: str) -> str | None:
    """Present value, or None where the kernel or the device is not there."""
    # Without Python's file objects, which take five times as long: a large node has thousands of these.
    try:
        file = os.open(f"{ROOT}/{key}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(file, _VALUE_BYTES).decode("ascii").strip()
    except OSError:
        return None
    finally:
        os.close(file)


def write(key: str, value: str) -> None:
    """Set one value.

    Raises:
        KernelError: no such key, or not allowed.
    """
    try:
        file = os.open(f"{ROOT}/{key}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(file, value.encode("ascii"))
        finally:
            os.close(file)
    except OSError as error:
        raise KernelError(
            f"set {key}",
            error.strerror or str(error),
            errno=error.errno or 0,
            hint="is /proc/sys writable here? (containers often mount it read-only)",
        ) from error


def observe(extra: Iterable[str], settings: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """All values that the plan may have to touch: rp_filter of every device, and the named keys.

    Args:
        extra: the keys.
        settings: what a dump of devices has just told: a file each would take ten times as long.
    """
    values = {
        f"{_IPV4_CONF}/{device}/{name}": told[name]
        for device, told in settings.items()
        for name in _PER_DEVICE
        if name in told
    }
    files = {f"{_IPV4_CONF}/default/{name}" for name in _INHERITED}
    files |= {f"{_IPV4_CONF}/all/{name}" for name in _PER_DEVICE}
    for key in extra:
        folder, _, name = key.rpartition("/")
        parent, _, device = folder.rpartition("/")
        told = settings.get(device, {}) if parent == _IPV4_CONF else {}
        if name in told:
            values[key] = told[name]
        else:
            files.add(key)
    return values | read_all(files)


def read_all(keys: Iterable[str]) -> dict[str, str]:
    """Present values of those that exist."""
    values = {key: read(key) for key in keys}
    return {key: value for key, value in values.items() if value is not None}


def has_ipv6() -> bool:
    """Whether the kernel has IPv6 (`ipv6.disable=1` takes it away)."""
    return (ROOT / "net/ipv6/conf/all").is_dir()


def forwarding() -> dict[int, bool]:
    """Whether the namespace forwards, by IP version."""
    return {
        4: read("net/ipv4/ip_forward") == "1",
        6: read("net/ipv6/conf/all/forwarding") == "1",
    }
