# SPDX-License-Identifier: Apache-2.0
"""`make deb`: the package for Debian 12 in dist/."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tools.deb.build import REPOSITORY, BuildError, build, package_version


def main() -> int:
    """Build it; the exit status."""
    parser = argparse.ArgumentParser(prog="tools.deb", description=__doc__)
    parser.add_argument("--version", default=package_version(), help="of the package; default: %(default)s")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "dist", help="folder; default: dist/")
    arguments = parser.parse_args()
    try:
        print(build(arguments.out, arguments.version))
    except BuildError as error:
        print(f"deb: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"deb: {error}\n{error.stderr or ''}", file=sys.stderr)
        return 1
    return 0


sys.exit(main())
