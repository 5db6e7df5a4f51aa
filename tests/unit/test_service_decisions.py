"""What becomes of a packet: source × frontend × traffic policies × detection of pods × masquerade-all, from objects on.

The table is that of the documentation ("Virtual IPs and Service Proxies") and of kube-proxy's own matrix. `all` and
`local` are the backends, M is masqueraded.
"""

from __future__ import annotations

import ipaddress

import pytest

from kube_proxy_lite.model import FrontendKind, PortPlan, Settings, Source, Verdict, decide, is_allowed
from tests.unit.service_objects import EXTERNAL_IP, HERE, VIP, key, node, service, services, slice_of, the_plan

POLICIES: dict[str, dict[str, str]] = {
    "default": {},
    "external Local": {"externalTrafficPolicy": "Local"},
    "internal Local": {"internalTrafficPolicy": "Local"},
    "both Local": {"externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local"},
}

# policy → (pod, node, external) to a ClusterIP; the same to a place that is reached from outside
TOLD_APART = {
    "default": ("all", "all M", "all M", "all M", "all M", "all M"),
    "external Local": ("all", "all M", "all M", "all", "all M", "local"),
    "internal Local": ("local", "local M", "local M", "all M", "all M", "all M"),
    "both Local": ("local", "local M", "local M", "all", "all M", "local"),
}
NOT_TOLD_APART = {
    "default": ("all", "all", "all", "all M", "all M", "all M"),
    "external Local": ("all", "all", "all", "local", "all M", "local"),
    "internal Local": ("local", "local", "local", "all M", "all M", "all M"),
    "both Local": ("local", "local", "local", "local", "all M", "local"),
}
POD_CIDRS = (ipaddress.ip_network("10.244.0.0/16"), ipaddress.ip_network("fd44::/16"))
DETECTORS = {
    "by networks": (Settings(node=HERE, cluster_cidrs=POD_CIDRS), TOLD_APART),
    "by interfaces": (Settings(node=HERE, pod_interfaces=("pw0",)), TOLD_APART),
    "not": (Settings(node=HERE), NOT_TOLD_APART),
}
SOURCES = (Source.POD, Source.NODE, Source.EXTERNAL)


def everything(policy: str, *endpoints: str, version: int = 4) -> PortPlan:
    """A Service that can be reached in every way."""
    web = service(
        version=version,
        type="LoadBalancer",
        ports=[{"port": 80, "nodePort": 30080}],
        externalIPs=[EXTERNAL_IP[version]],
        status=[{"ip": VIP[version]}],
        **POLICIES[policy],
    )
    return the_plan(services(web, slice_of(*endpoints, version=version)), key(version=version))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("masquerade_all", [False, True], ids=["", "masquerade all"])
@pytest.mark.parametrize(("told", "table"), DETECTORS.values(), ids=DETECTORS.keys())
@pytest.mark.parametrize("policy", POLICIES)
def test_every_flow(
    policy: str, told: Settings, table: dict[str, tuple[str, ...]], masquerade_all: bool, version: int
) -> None:
    settings = Settings(
        node=HERE,
        cluster_cidrs=told.cluster_cidrs,
        pod_interfaces=told.pod_interfaces,
        masquerade_all=masquerade_all,
    )
    plan = everything(policy, "1 here", "2", version=version)
    assert {frontend.kind for frontend in plan.frontends} == set(FrontendKind)
    for frontend in plan.frontends:
        internal = frontend.kind is FrontendKind.CLUSTER_IP
        expected = table[policy][:3] if internal else table[policy][3:]
        for source, words in zip(SOURCES, expected, strict=True):
            decision = decide(plan, frontend, source, settings)
            backends = plan.local if "local" in words else plan.cluster
            assert decision.verdict is Verdict.FORWARD
            assert decision.backends == backends, (frontend, source)
            assert decision.masquerade == ("M" in words or (masquerade_all and internal)), (frontend, source)
    assert [backend.local for backend in plan.cluster] == [True, False]


def test_pods_of_one_family_alone_are_told_apart() -> None:
    settings = Settings(node=HERE, cluster_cidrs=POD_CIDRS[:1])
    assert settings.detects(4)
    assert not settings.detects(6)
    masqueraded = []
    for version in (4, 6):
        plan = everything("default", "1", version=version)
        cluster_ip = next(each for each in plan.frontends if each.kind is FrontendKind.CLUSTER_IP)
        masqueraded.append(decide(plan, cluster_ip, Source.EXTERNAL, settings).masquerade)
    assert masqueraded == [True, False]


# endpoints, policy → (pod, node, external) to a ClusterIP; to a NodePort
WITHOUT: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "nobody at all": ((), "default", ("refuse",) * 6),
    "nobody at all, Local": ((), "both Local", ("refuse",) * 6),
    "nobody is ready": (("1 here unready", "2 dead"), "both Local", ("refuse",) * 6),
    "somebody elsewhere": (("2",), "default", ("forward",) * 6),
    "elsewhere, external Local": (("2",), "external Local", (*("forward",) * 5, "drop")),
    "elsewhere, internal Local": (("2",), "internal Local", (*("drop",) * 3, *("forward",) * 3)),
    "elsewhere, both Local": (("2",), "both Local", (*("drop",) * 3, "forward", "forward", "drop")),
    "who drains elsewhere": (("2 draining",), "both Local", (*("drop",) * 3, "forward", "forward", "drop")),
    "who drains here": (("1 here draining", "2"), "both Local", ("forward",) * 6),
}


@pytest.mark.parametrize(("endpoints", "policy", "expected"), WITHOUT.values(), ids=WITHOUT.keys())
def test_where_nobody_answers(endpoints: tuple[str, ...], policy: str, expected: tuple[str, ...]) -> None:
    settings = DETECTORS["by networks"][0]
    plan = everything(policy, *endpoints)
    frontends = {frontend.kind: frontend for frontend in plan.frontends}
    verdicts = [
        decide(plan, frontends[kind], source, settings).verdict
        for kind in (FrontendKind.CLUSTER_IP, FrontendKind.NODE_PORT)
        for source in SOURCES
    ]
    assert verdicts == [Verdict(word) for word in expected]


def test_source_ranges_close_a_balancers_address_alone() -> None:
    web = service(
        type="LoadBalancer",
        ports=[{"port": 80, "nodePort": 30080}],
        status=[{"ip": VIP[4]}],
        loadBalancerSourceRanges=["203.0.113.0/24"],
    )
    plan = the_plan(services(web, slice_of("1"), node(addresses=["172.31.0.2"])))
    client, stranger = ipaddress.ip_address("203.0.113.9"), ipaddress.ip_address("203.0.114.9")
    for frontend in plan.frontends:
        assert is_allowed(frontend, client)
        assert is_allowed(frontend, stranger) == (frontend.kind is not FrontendKind.LOAD_BALANCER)
