"""The proxy's metrics: their names are what docs/metrics.md says, and what dashboards for kube-proxy ask for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from kube_proxy_lite.metrics import Metrics

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def exported(mode: str) -> dict[str, str]:
    """Names and types."""
    text = generate_latest(Metrics(mode).registry).decode()
    found = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    return {name: kind for name, kind in found.items() if not name.endswith("_created")}


def documented() -> dict[str, str]:
    rows = re.findall(
        r"^\| `((?:kubeproxy|podwire_proxy|podwire_policy)_\S+)` \| (\S+) \|", DOCUMENT.read_text(), re.MULTILINE
    )
    return dict(rows)


def test_the_document_has_every_metric_and_no_other() -> None:
    every = exported("nftables") | exported("iptables")
    assert documented() == every


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("nftables", "kubeproxy_sync_proxy_rules_nftables_sync_failures_total"),
        ("iptables", "kubeproxy_sync_proxy_rules_iptables_restore_failures_total"),
    ],
)
def test_failures_have_the_name_that_kube_proxy_gives_them_in_the_mode(mode: str, name: str) -> None:
    made = Metrics(mode)
    made.services.failed("no")
    assert made.registry.get_sample_value(name) == 1
    assert name not in exported("none")


def test_what_is_pending_is_what_no_run_has_served() -> None:
    made = Metrics("nftables")
    pending = "kubeproxy_sync_proxy_rules_endpoint_changes_pending"
    made.services.noted("endpointslices.discovery.k8s.io", 5)
    made.services.begun()
    made.services.noted("endpointslices.discovery.k8s.io", 2)
    made.services.noted("nodes", 1)
    made.services.synced(0.1, resync=False, changes=1, waited=0.1)
    assert made.registry.get_sample_value(pending) == 2
    made.services.begun()
    made.services.failed("no")
    made.services.begun()
    made.services.synced(0.1, resync=True, changes=1, waited=0.1)
    assert made.registry.get_sample_value(pending) == 0
    assert made.registry.get_sample_value("kubeproxy_sync_proxy_rules_endpoint_changes_total") == 7
