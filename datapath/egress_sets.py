# SPDX-License-Identifier: Apache-2.0
"""`datapath egress`: an external program says which addresses open their connections by a network.

One transaction of single elements, whatever the size of the policy; nothing is compiled. The state remembers the
addresses, so that an apply, a repair and the next boot put them back.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from datapath.errors import InputError, KernelError
from datapath.facts import IpNetwork
from datapath.in_force import parse_in_force
from datapath.kernel import egress, transaction
from datapath.plan.egress import MEMBERS_MAX, member_elements, member_text, members_set
from datapath.plan.ingress import prefix_order
from datapath.plan.nft import TABLE_FAMILY, TABLE_NAME, NftMap, NftTable
from datapath.plan.render import element_commands
from datapath.plan.rtnl import Family
from datapath.policy import Egress, Policy
from datapath.policy.addresses import RefusedError, parse_prefix, prefix_range, shown, supernets
from datapath.policy.check_addresses import NOT_SERVABLE_INDEX, NOT_SERVABLE_NAME
from datapath.state import State, StateDirectory

_TABLE = NftTable(TABLE_FAMILY, TABLE_NAME)


class Verb(enum.StrEnum):
    """What is done to a set."""

    SET = "set"
    ADD = "add"
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class Members:
    """One set.

    Attributes:
        network: that its connections leave by; None where the policy in force has no such entry.
        changed: whether a call did something; None where none was made.
    """

    name: str
    members: tuple[IpNetwork, ...]
    network: str | None = None
    changed: bool | None = None

    def as_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "name": self.name,
            "members": [member_text(prefix) for prefix in self.members],
        }
        return body | ({"network": self.network} if self.changed is None else {"changed": self.changed})

    def render(self) -> str:
        """One line for people; the addresses alone are `get`."""
        text = f"{self.name}: {len(self.members)} member(s)"
        if self.changed is None:
            return f"{text}, by {self.network}" if self.network else f"{text}, not in the policy in force"
        return text if self.changed else f"nothing to do: {text}"


class EgressSets:
    """The sets of one namespace."""

    def __init__(self, directory: StateDirectory) -> None:
        self._directory = directory

    def all(self) -> tuple[Members, ...]:
        """Every set of the policy in force, and those that are remembered for another policy."""
        state = self._directory.load()
        networks = {entry.name: entry.network for entry in _policy(state).egress if entry.set}
        names = sorted({*networks, *state.egress_sets})
        return tuple(Members(n, tuple(state.egress_sets.get(n, ())), networks.get(n)) for n in names)

    def get(self, name: str) -> Members:
        """One set.

        Raises:
            InputError: there is none of that name.
        """
        found = next((item for item in self.all() if item.name == name), None)
        if found is None:
            raise _unknown(name, _policy(self._directory.load()))
        return found

    def change(self, name: str, verb: Verb, addresses: Sequence[str]) -> Members:
        """Change one set, for connections that are opened from now on.

        Raises:
            InputError: there is no such set, or an address cannot be in it.
            KernelError: the kernel refused; nothing was changed.
        """
        given = [_member(text) for text in addresses]
        with self._directory.locked():
            state = self._directory.load()
            families = egress.families_of_set(name) if state.policy else frozenset()
            if not families:
                raise _unknown(name, _policy(state))
            before = tuple(state.egress_sets.get(name, ()))
            after = _changed(verb, before, given)
            _require_families(name, after, families)
            _require_apart(before, after)
            if len(after) > MEMBERS_MAX:
                raise InputError(
                    f"more than {MEMBERS_MAX} members", hint="name prefixes instead of addresses"
                )
            text = self._transaction(name, families, before, after)
            changed = after != before
            if changed:
                # Remembered first: what is killed in between is put right by the next apply, or by the daemon.
                new = dict(state.egress_sets) | {name: after}
                self._directory.save(dataclasses.replace(state, egress_sets=new))
            if text:
                try:
                    transaction.apply(text)
                except KernelError:
                    self._directory.save(state)
                    raise
        return Members(name, after, changed=changed or bool(text))

    def _transaction(
        self, name: str, families: frozenset[Family], before: Iterable[IpNetwork], after: Iterable[IpNetwork]
    ) -> str:
        """From what is remembered; from what the kernel has where that is not the same."""
        known = {family: dict(member_elements(before, family)) for family in families}
        text = _commands(name, known, after)
        try:
            transaction.check(text)
        except KernelError:
            known = {family: egress.set_elements(name, family) for family in families}
            text = _commands(name, known, after)
            transaction.check(text)
        return text


def _commands(name: str, known: dict[Family, dict[str, str]], after: Iterable[IpNetwork]) -> str:
    lines: list[str] = []
    for family, old in sorted(known.items()):
        item = NftMap(members_set(name, family), "", "", ())
        new = dict(member_elements(after, family))
        lines += element_commands("delete", _TABLE, item, [(key, "") for key in old if key not in new])
        lines += element_commands("add", _TABLE, item, [(key, "") for key in new if key not in old])
    return "\n".join(lines) + "\n" if lines else ""


def _changed(verb: Verb, before: tuple[IpNetwork, ...], given: list[IpNetwork]) -> tuple[IpNetwork, ...]:
    match verb:
        case Verb.SET:
            chosen = set(given)
        case Verb.ADD:
            chosen = {*before, *given}
        case Verb.REMOVE:
            chosen = set(before) - set(given)
            lengths = {member.prefixlen for member in chosen}
            inside = next((p for p in given if not chosen.isdisjoint(supernets(p, lengths))), None)
            if inside is not None:
                raise InputError(
                    f"{member_text(inside)} is a source by a wider member",
                    hint="`datapath egress get` shows the members: remove that one, and add what is to stay",
                )
    return tuple(sorted(chosen, key=prefix_order))


def _require_apart(before: Iterable[IpNetwork], after: Iterable[IpNetwork]) -> None:
    """No two members overlap, nor does a new one with an old one that goes.

    Who is in both would be in neither for a moment, and his connections would leave as without the policy.
    """
    ranges = sorted({*before, *after}, key=prefix_order)
    for wide, narrow in itertools.pairwise(ranges):
        if wide.version == narrow.version and narrow.network_address in wide:
            raise InputError(
                f"{member_text(narrow)} and {member_text(wide)} overlap, and members are apart",
                hint="keep one of them; to replace one by the other, remove it first",
            )


def _member(text: str) -> IpNetwork:
    try:
        prefix = parse_prefix(text)
    except RefusedError as refused:
        raise InputError(str(refused), hint=refused.hint) from None
    hint = "name the pods' addresses"
    if prefix.prefixlen == 0:
        raise InputError(f"{shown(text)} is every address", hint=hint)
    wrong = NOT_SERVABLE_INDEX.overlapping(prefix_range(prefix))
    if wrong is not None:
        what = NOT_SERVABLE_NAME[wrong]
        raise InputError(f"{shown(text)} cannot be a source: it is or holds {what} ({wrong})", hint=hint)
    return prefix


def _require_families(name: str, members: Iterable[IpNetwork], families: frozenset[Family]) -> None:
    wrong = next((prefix for prefix in members if prefix.version not in families), None)
    if wrong is not None:
        raise InputError(
            f"egress {name} has no IPv{wrong.version}: {member_text(wrong)} cannot be a member",
            hint="it works in the families of which the network has a gateway and `source_ip` an address",
        )


def _policy(state: State) -> Policy:
    if not state.policy:
        raise InputError("no policy is in force in this namespace", hint="apply one first")
    return parse_in_force(state).policy


def _unknown(name: str, policy: Policy) -> InputError:
    entry: Egress | None = next((entry for entry in policy.egress if entry.name == name), None)
    if entry is None:
        names = ", ".join(item.name for item in policy.egress if item.set)
        hint = f"there are: {names}" if names else "give an entry of `egress` in the policy `set: true`"
        return InputError(f"the policy in force has no egress {shown(name)}", hint=hint)
    if not entry.set:
        return InputError(
            f"egress {name} has no set: its sources are those of the policy", hint="give it `set: true`"
        )
    return InputError(
        f"the set of egress {name} is not in the kernel", hint="`datapath status` tells what drifted"
    )
