# SPDX-License-Identifier: Apache-2.0
"""What Prometheus and the log are told of gateways."""

from __future__ import annotations

from ipaddress import ip_address

import structlog
from prometheus_client import CollectorRegistry, generate_latest

from datapath.observe.metrics import ServiceCollector
from datapath.observe.stats import ServiceStats
from datapath.plan.gateways import CheckMethod, GatewayCheck
from datapath.service.gateways import Change, report_change

FIRST, SECOND = ip_address("10.0.0.1"), ip_address("10.0.0.2")


def check(address: object) -> GatewayCheck:
    return GatewayCheck("n", "eth0", ip_address(str(address)), CheckMethod.NEIGHBOUR, 0.2, 3, 5, 5.0)


def scraped(stats: ServiceStats) -> set[str]:
    registry = CollectorRegistry()
    registry.register(ServiceCollector(stats))
    return {line for line in generate_latest(registry).decode().splitlines() if "gateway_" in line}


def test_up_and_how_often_down() -> None:
    stats = ServiceStats(gateways={("n", FIRST): True, ("n", SECOND): True})
    with structlog.testing.capture_logs() as log:
        report_change(Change(check(FIRST), is_up=False, hold_s=5.0), {"n": (FIRST,)}, stats)
    assert [entry["event"] for entry in log] == ["gateway_down"]
    text = scraped(stats)
    assert 'datapath_gateway_up{gateway="10.0.0.1",network="n"} 0.0' in text
    assert 'datapath_gateway_up{gateway="10.0.0.2",network="n"} 1.0' in text
    assert 'datapath_gateway_failures_total{gateway="10.0.0.1",network="n"} 1.0' in text
    assert 'datapath_gateway_failures_total{gateway="10.0.0.2",network="n"} 0.0' in text
    with structlog.testing.capture_logs() as log:
        report_change(Change(check(SECOND), is_up=False, hold_s=5.0), {"n": (FIRST, SECOND)}, stats)
        report_change(Change(check(SECOND), is_up=True), {"n": (FIRST,)}, stats)
    assert [entry["event"] for entry in log] == ["gateway_down", "gateways_all_down", "gateway_up"]
    assert 'datapath_gateway_up{gateway="10.0.0.2",network="n"} 1.0' in scraped(stats)


def test_one_that_cannot_be_asked_is_no_failure() -> None:
    stats = ServiceStats(gateways={("n", FIRST): True})
    with structlog.testing.capture_logs() as log:
        report_change(Change(check(FIRST), is_up=True, problem="Network is down"), {}, stats)
    assert [(entry["event"], entry["taken_for"]) for entry in log] == [("gateway_cannot_be_asked", "up")]
    assert not stats.gateway_failures
    assert stats.gateways == {("n", FIRST): True}


def test_those_that_cannot_be_asked() -> None:
    stats = ServiceStats(
        gateways={("n", FIRST): True, ("n", SECOND): True}, gateways_unasked=frozenset({("n", SECOND)})
    )
    text = scraped(stats)
    assert 'datapath_gateway_unasked{gateway="10.0.0.1",network="n"} 0.0' in text
    assert 'datapath_gateway_unasked{gateway="10.0.0.2",network="n"} 1.0' in text


def test_nothing_where_none_is_watched() -> None:
    assert not scraped(ServiceStats())
