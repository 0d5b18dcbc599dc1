#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs the Debian packages of one or more lanes of packages.txt, by name, and with --venv the virtual
# environment with those extras of pyproject.toml. Needs root only if a package is missing. Starts no service and touches no network setting:
# of these packages nftables has a unit that Debian installs disabled, and frr has one that is kept from starting here.
#
#   tools/setup/install.sh [--venv EXTRA,EXTRA] LANE...

set -euo pipefail
cd "$(dirname "$0")/../.."

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

packages_of() { # LANE... -> package names
    awk -v lanes=" $* " '!/^#/ && NF && index(lanes, " " $2 " ") { print $1 }' tools/setup/packages.txt
}

missing_of() { # PACKAGE... -> those that are not installed
    local name
    for name in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || printf '%s\n' "$name"
    done
}

install_packages() { # LANE...
    local -a wanted missing
    mapfile -t wanted < <(packages_of "$@")
    [ "${#wanted[@]}" -gt 0 ] || fail "no packages in lane(s): $*"
    mapfile -t missing < <(missing_of "${wanted[@]}")
    if [ "${#missing[@]}" -eq 0 ]; then
        say "all ${#wanted[@]} Debian packages of lane(s) $* are installed"
        return
    fi
    say "installing Debian packages: ${missing[*]}"
    [ "$(id -u)" -eq 0 ] || fail "not root: run 'sudo make setup', or install these packages first"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q </dev/null
    refuse_services
    apt-get install -y -q --no-install-recommends "${missing[@]}" </dev/null
    case " ${missing[*]} " in
        # A routing daemon that nobody configured has no business on this machine after the next boot, either.
        *" frr "*) systemctl --quiet disable frr.service ;;
    esac
}

refuse_services() { # Until this script ends, packages may not start what they bring (policy-rc.d of init-system-helpers).
    local policy=/usr/sbin/policy-rc.d
    if ! [ -e "$policy" ]; then
        trap "rm -f $policy" EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
}

make_venv() { # EXTRA,EXTRA
    # Debian's interpreter by its full path: bcc and nftables exist only for that one.
    local python=/usr/bin/python3
    if ! [ -x .venv/bin/python ]; then
        say "making .venv"
        "$python" -m venv --system-site-packages .venv
    fi
    say "installing datapath[$1] into .venv"
    .venv/bin/python -m pip install --quiet --editable ".[$1]" </dev/null
}

extras=
if [ "${1:-}" = --venv ]; then
    extras=${2:-}
    shift 2
fi
[ "$#" -gt 0 ] || fail "usage: tools/setup/install.sh [--venv EXTRA,EXTRA] LANE..."
install_packages "$@"
[ -z "$extras" ] || make_venv "$extras"
say "done"
