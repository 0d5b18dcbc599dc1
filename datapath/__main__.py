# SPDX-License-Identifier: Apache-2.0
"""`python -m datapath`: the same as the `datapath` command."""

import sys

from datapath.cli import main

if __name__ == "__main__":
    sys.exit(main())
