# SPDX-License-Identifier: Apache-2.0
"""A network namespace of its own for one check: works for a normal user, and touches nothing of the host."""

from __future__ import annotations

import os
import subprocess
import sys

from datapath.errors import KernelError

_TIMEOUT_S = 60


def check_nft(text: str) -> None:
    """Load an nft file for real, in a namespace that ends with the check.

    As root the network namespace alone is new; a normal user gets a user namespace around it.

    Raises:
        KernelError: nft or the kernel refused it, with nft's own message, or no namespace can be made.
    """
    command = ["unshare", "--net"]
    if os.geteuid() != 0:
        command.append("--map-root-user")
    command += [sys.executable, "-P", "-m", "datapath.kernel.sandbox"]
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError("check the nft file", str(error)) from error
    if done.returncode != 0:
        hint = (
            "are user namespaces allowed here (kernel.unprivileged_userns_clone)?" if not done.stdout else ""
        )
        raise KernelError(
            "check the nft file",
            (done.stdout or done.stderr).strip() or "refused without a message",
            hint=hint,
        )


def _main() -> int:
    """The inner side: apply standard input; everything goes with the namespace."""
    import nftables  # noqa: PLC0415  (only the inner side needs libnftables)

    nft = nftables.Nftables()
    status, _, errors = nft.cmd(sys.stdin.read())
    sys.stdout.write(errors)
    return 1 if status else 0


if __name__ == "__main__":
    raise SystemExit(_main())
