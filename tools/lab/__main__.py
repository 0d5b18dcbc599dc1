# SPDX-License-Identifier: Apache-2.0
"""`python -m tools.lab demo` and `python -m tools.lab clean`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import get_args

from tools.lab import classic
from tools.lab.demo import demo
from tools.lab.dnat import Dnat
from tools.lab.netns import LabError, leftovers, remove


def main() -> int:
    """Parse the command line and run; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser(
        "demo", help="show the return path without a policy, with the classic recipe, and with datapath"
    )
    show.add_argument(
        "--dnat",
        type=Dnat,
        choices=list(Dnat),
        default=Dnat.NFTABLES,
        help="whose rules do the DNAT (%(default)s)",
    )
    show.add_argument(
        "--recipe",
        choices=get_args(classic.Tool),
        default="iptables-nft",
        help="what the classic recipe is made with",
    )
    commands.add_parser("clean", help="remove the namespaces of labs whose process is gone")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("the lab makes network namespaces: run it as root", file=sys.stderr)
        return 1
    if options.command == "clean":
        for name in leftovers():
            remove(name)
            print(f"removed {name}")
        return 0
    try:
        return demo(options.dnat, options.recipe)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
