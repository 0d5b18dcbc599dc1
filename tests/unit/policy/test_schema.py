# SPDX-License-Identifier: Apache-2.0
"""The reference page and the JSON Schema are current, and the schema agrees with the loader."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # its stubs are not among the tools
import pytest
import yaml

from datapath.policy import MarkProfile, Policy, parse_policy
from datapath.policy.base import PolicyModel
from tools import gen_policy_docs

REPOSITORY = Path(__file__).parents[3]
SCHEMA = json.loads((REPOSITORY / "docs" / "policy.schema.json").read_text(encoding="utf-8"))

EXAMPLE: dict[str, Any] = {
    "version": 1,
    "node": {"internal": ["10.96.0.0/12", "fd00::/48"]},
    "marks": {"mask": 0x0FFF_0000},
    "rules": {"priority": 700},
    "steering": "rules",
    "backend": "auto",
    "networks": [
        {
            "name": "public",
            "vlan": {"parent": "eth0", "id": 100, "name": "pub", "protocol": "802.1ad"},
            "vips": ["192.0.2.0/24", "2001:db8::1-2001:db8::9"],
            "gateway": ["192.0.2.1", "fe80::1"],
            "on_link": ["192.0.2.0/24"],
            "return_path": "source",
            "reverse_path": {"vips": "off", "other": "loose", "allow": ["203.0.113.0/24"], "deny": []},
            "table": 5000,
            "mark": 0x10000,
            "isolate_clients": False,
            "strict_arp": True,
            "steering": "rules",
            "track": "last",
        },
        {
            "name": "b",
            "interface": "eth1",
            "vips": ["198.51.100.1"],
            "gateway": "198.51.100.2",
            "on_link": ["198.51.100.2"],
        },
        {
            "name": "c",
            "interface": "eth2",
            "vips": ["203.0.113.0/24"],
            "gateways": ["203.0.113.1", {"address": "203.0.113.2"}, {"address": "203.0.113.3", "weight": 16}],
            "gateway_mode": "ecmp",
            "gateway_check": {
                "method": "icmp",
                "interval_ms": 50,
                "multiplier": 4,
                "recovery": 10,
                "hold_s": 0,
            },
        },
    ],
    "probes": [
        {"gateway": "public", "timeout": 1, "attempts": 10},
        {"tcp": "192.0.2.50:443", "network": "public"},
        {"tcp": "[2001:db8::50]:443"},
        {"http": "http://[2001:db8::50]:8080/healthz?full=1"},
    ],
}


def accepted(policy: Any) -> bool:
    return not list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(policy))


def changed(*path: str | int, value: Any) -> dict[str, Any]:
    policy = copy.deepcopy(EXAMPLE)
    target: Any = policy
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    return policy


@pytest.mark.parametrize("name", gen_policy_docs.OUTPUTS)
def test_generated_files_are_current(name: str) -> None:
    current = (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
    assert current == gen_policy_docs.OUTPUTS[name](), "run python -m tools.gen_policy_docs"


def test_check_says_what_is_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gen_policy_docs.main(["--docs", str(tmp_path), "--check"]) == 1
    assert "is stale" in capsys.readouterr().err
    assert gen_policy_docs.main(["--docs", str(tmp_path)]) == 0
    assert gen_policy_docs.main(["--docs", str(tmp_path), "--check"]) == 0
    (tmp_path / "policy.md").write_text("old", encoding="utf-8")
    assert gen_policy_docs.main(["--docs", str(tmp_path), "--check"]) == 1


def test_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_example_is_right_for_the_loader_and_the_schema() -> None:
    assert parse_policy(yaml.safe_dump(EXAMPLE).encode(), "p").policy.networks[0].device == "pub"
    assert accepted(EXAMPLE)


def shown_policies() -> dict[str, str]:
    """The example of the page and every shipped policy."""
    page = (REPOSITORY / "docs" / "policy.md").read_text(encoding="utf-8")
    shipped = sorted((REPOSITORY / "rulesets").glob("*/policy.yaml"))
    return {"docs/policy.md": page.partition("```yaml\n")[2].partition("```")[0]} | {
        path.parent.name: path.read_text(encoding="utf-8") for path in shipped
    }


@pytest.mark.parametrize(("name", "text"), shown_policies().items())
def test_shown_policies_load_and_fit_the_schema(name: str, text: str) -> None:
    assert parse_policy(text.encode(), name).policy.networks
    assert accepted(yaml.safe_load(re.sub(r": off\b", ": 'off'", text)))


@pytest.mark.parametrize(
    "policy",
    [
        changed("colour", value=1),
        changed("networks", 0, "colour", value=1),
        changed("networks", 0, "vlan", "colour", value=1),
        changed("networks", 0, "reverse_path", "colour", value=1),
        changed("networks", 0, "interface", value="eth0"),
        changed("networks", 0, "vlan", "id", value=4095),
        changed("networks", 0, "vlan", "protocol", value="802.1x"),
        changed("networks", 0, "vips", value=[]),
        changed("networks", 0, "name", value="Public"),
        changed("networks", 0, "table", value=254),
        changed("networks", 0, "table", value=None),
        changed("networks", 0, "strict_arp", value="yes"),
        changed("networks", 1, "interface", value="a/b"),
        changed("networks", 2, "gateways", 1, value={"weight": 2}),
        changed("networks", 2, "gateways", 1, value={"address": "203.0.113.2", "weight": 17}),
        changed("networks", 2, "gateways", 1, value=1),
        changed("networks", 2, "gateway_mode", value="standby"),
        changed("networks", 2, "gateway_check", value={"method": "vtysh"}),
        changed("networks", 2, "gateway_check", value={"method": "bfd", "bfd_socket": "bfdd.vty"}),
        changed("networks", 2, "gateway_check", value={"interval_ms": 9}),
        changed("networks", value=[]),
        changed("version", value=2),
        changed("marks", "profile", value="tailscale"),
        changed("marks", value={"profile": "cilium"}),
        changed("rules", "priority", value=30000),
        changed("probes", value=[{"gateway": "public", "tcp": "192.0.2.1:443"}]),
        changed("probes", value=[{"network": "public"}]),
        changed("probes", value=[{"http": "https://192.0.2.1/"}]),
        changed("probes", value=[{"gateway": "public", "attempts": 11}]),
    ],
)
def test_schema_refuses(policy: dict[str, Any]) -> None:
    assert not accepted(policy)


def models(model: type[PolicyModel]) -> set[type[PolicyModel]]:
    return {inner for _, inner in gen_policy_docs._models(model, "Top level")}


def test_every_field_is_described() -> None:
    assert len(models(Policy)) == 12
    for model in models(Policy):
        assert all(field.description for field in model.model_fields.values()), model


def test_the_page_has_every_key_and_profile() -> None:
    page = (REPOSITORY / "docs" / "policy.md").read_text(encoding="utf-8")
    for model in models(Policy):
        assert all(f"| `{key}` |" in page for key in model.model_fields)
    assert all(f"| `{profile}` |" in page for profile in MarkProfile)
