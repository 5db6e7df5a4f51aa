"""What the proxy tells those who ask: balancers, the cluster's autoscaler, Prometheus."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.netns.plain_api import Object, inside
from tests.netns.proxy_fixtures import (
    HEALTH_PORT,
    ProxyStage,
    ask,
    clean,
    endpoints,
    node,
    proxy_stage,
    service,
    until,
)
from tests.unit.service_cases import LOCAL, LOCAL_2, REMOTE, address

CHECKED = 32100
OTHER = 32101


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxyStage]:
    with proxy_stage(tmp_path_factory.mktemp("proxy")) as made:
        yield made


@pytest.fixture
def place(whole: ProxyStage) -> Iterator[ProxyStage]:
    clean(whole)
    yield whole
    clean(whole)


def balanced(name: str = "web", number: int = 1, port: int = CHECKED) -> Object:
    """A Service that balancers ask about."""
    return service(
        name,
        number,
        type="LoadBalancer",
        externalTrafficPolicy="Local",
        healthCheckNodePort=port,
        status={"loadBalancer": {"ingress": [{"ip": f"203.0.113.{number}"}]}},
    )


def test_a_balancer_is_told_how_many_endpoints_are_here(place: ProxyStage) -> None:
    place.api.put(balanced(), endpoints("web", LOCAL, LOCAL_2, REMOTE), node())
    proxy = place.start()

    def told(ready: int) -> bool:
        status, body, headers = proxy.healthz("/anything", CHECKED)
        if not status or body["localEndpoints"] != ready:
            return False
        assert status == (200 if ready else 503)
        assert headers["x-load-balancing-endpoint-weight"] == str(ready)
        assert body["service"] == {"namespace": "default", "name": "web"}
        assert body["serviceProxyHealthy"]
        return True

    until(lambda: told(2))
    for version in (4, 6):
        host = str(address("10.0.0.1", version))
        assert inside(place.stage.outside.path, lambda host=host: ask(host, CHECKED, "/"))[0] == 200  # type: ignore[misc]
    place.api.put(endpoints("web", LOCAL, REMOTE, terminating=(LOCAL_2,)))
    until(lambda: told(1))
    place.api.put(endpoints("web", REMOTE, terminating=(LOCAL,)))
    until(lambda: told(0))
    assert proxy.metric("kubeproxy_sync_proxy_rules_no_local_endpoints_total", traffic_policy="external") == 0, (
        "one that terminates still serves"
    )
    place.api.put(endpoints("web", REMOTE))
    until(lambda: proxy.metric("kubeproxy_sync_proxy_rules_no_local_endpoints_total", traffic_policy="external") == 1)
    place.api.put(balanced(port=OTHER), endpoints("web", LOCAL))
    until(lambda: proxy.healthz("/", OTHER)[0] == 200 and proxy.healthz("/", CHECKED)[0] == 0)
    place.api.put(service("web"))
    until(lambda: proxy.healthz("/", OTHER)[0] == 0)


def test_a_port_that_another_program_has_is_told_and_tried_again(place: ProxyStage) -> None:
    """The health check of one Service; those of the others are served."""
    taken = inside(place.node.path, lambda: socket.create_server(("0.0.0.0", CHECKED)))
    with taken:
        place.api.put(balanced(), endpoints("web", LOCAL), balanced("second", 2, OTHER), endpoints("second", LOCAL))
        proxy = place.start()
        until(lambda: proxy.healthz("/", OTHER)[0] == 200)
        until(lambda: proxy.metric("podwire_proxy_health_ports_missing") == 1)
        assert len(proxy.said(f"health node port {CHECKED} of default/web", "in use")) == 1
    place.api.put(endpoints("second", REMOTE), service("third", 3))
    until(lambda: proxy.healthz("/", CHECKED)[0] == 200)
    assert proxy.metric("podwire_proxy_health_ports_missing") == 0


def test_a_port_for_health_checks_that_is_taken_costs_no_service(place: ProxyStage) -> None:
    place.api.put(service("web"), endpoints("web", LOCAL))
    with inside(place.node.path, lambda: socket.create_server(("0.0.0.0", HEALTH_PORT))):
        proxy = place.start(ready=False)
        place.served("10.96.0.1", LOCAL)
        until(lambda: len(proxy.said("/healthz cannot be served", "in use")) == 1)
    until(lambda: proxy.healthz()[0] == 200)


def test_a_node_that_leaves_is_not_healthy_and_goes_on_serving(place: ProxyStage) -> None:
    place.api.put(balanced(), endpoints("web", LOCAL), node())
    proxy = place.start()
    assert proxy.healthz()[1]["nodeEligible"]
    tainted = node(taints=[{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}])
    deleted = node()
    deleted["metadata"] = {**deleted["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}
    for obj, why in ((tainted, "ToBeDeletedByClusterAutoscaler"), (deleted, "being deleted")):
        place.api.put(obj)
        until(lambda: proxy.healthz()[0] == 503)
        assert why in proxy.healthz()[1]["reason"]
        assert not proxy.healthz()[1]["nodeEligible"]
        assert proxy.healthz("/livez")[0] == 200
        assert proxy.healthz("/", CHECKED)[0] == 200, "connections that a balancer still sends are served"
        place.api.put(node())
        until(lambda: proxy.healthz()[0] == 200)
    place.api.drop("Node", "a")
    until(lambda: proxy.healthz()[0] == 503)
    assert proxy.metric("kubeproxy_proxy_healthz_total", code="503") >= 3
    assert proxy.metric("kubeproxy_proxy_livez_total", code="200") >= 2
    assert place.answers() == LOCAL


def test_tools_that_know_kube_proxy_are_told_the_mode(place: ProxyStage) -> None:
    place.start(mode="iptables")
    assert inside(place.node.path, lambda: ask("127.0.0.1", 10249, "/proxyMode"))[:2] == (200, "iptables")


def test_pods_and_node_ports_by_what_the_node_is(place: ProxyStage) -> None:
    """nodeCIDRs and nodePortAddresses `primary` follow the node's object."""
    place.api.put(service("web", node_port=30001), endpoints("web", LOCAL), node())
    place.start(clusterCIDRs=None, nodeCIDRs=True, nodePortAddresses=["primary"])
    assert place.elements("pods") == {}
    assert list(place.elements("node_addresses")) == ["10.0.0.1"]
    assert list(place.elements("node_addresses", 6)) == ["::"]
    place.api.put(node(podCIDRs=["10.244.1.0/24"]))
    until(lambda: list(place.elements("pods")) == ["10.244.1.0/24"])
    assert place.answers("10.0.0.1", 30001) == LOCAL
    assert place.answers("10.0.1.1", 30001) == "refuse"
    moved = node(podCIDRs=["10.244.7.0/24"])
    moved["status"] = {"addresses": [{"type": "InternalIP", "address": "10.0.1.1"}]}
    place.api.put(moved)
    until(lambda: list(place.elements("pods")) == ["10.244.7.0/24"])
    assert place.answers("10.0.1.1", 30001) == LOCAL


def test_health_node_ports_are_where_node_ports_are(place: ProxyStage) -> None:
    """And follow the node's object; elsewhere the port is anybody's."""
    with inside(place.node.path, lambda: socket.create_server(("10.0.1.1", CHECKED))):
        place.api.put(balanced(), endpoints("web", LOCAL), node())
        proxy = place.start(nodePortAddresses=["primary"])
        until(lambda: asked_at(place, "10.0.0.1") == 200)
        assert asked_at(place, "127.0.0.1") == 0
        assert proxy.metric("podwire_proxy_health_ports_missing") == 0
    moved = node()
    moved["status"] = {"addresses": [{"type": "InternalIP", "address": "10.0.1.1"}]}
    place.api.put(moved)
    until(lambda: asked_at(place, "10.0.1.1") == 200)
    assert asked_at(place, "10.0.0.1") == 0


def asked_at(place: ProxyStage, host: str) -> int:
    """The status that the health node port answers with at an address of the node, 0 when nobody is there."""
    try:
        return inside(place.node.path, lambda: ask(host, CHECKED, "/"))[0]
    except OSError:
        return 0


def test_limits_of_connection_tracking(place: ProxyStage) -> None:
    names = {"tcpEstablishedTimeout": "tcp_timeout_established", "tcpBeLiberal": "tcp_be_liberal"}

    def now() -> list[str]:
        paths = [f"/proc/sys/net/netfilter/nf_conntrack_{name}" for name in names.values()]
        return place.node.run("cat", *paths).split()

    before = now()
    place.start().end()
    assert now() == before, "nothing is set without being asked for"
    try:
        proxy = place.start(conntrack={"tcpEstablishedTimeout": 7200, "tcpBeLiberal": True, "maxPerCore": 1})
        assert now() == ["7200", "1"]
        assert proxy.alive()
    finally:
        for name, value in zip(names.values(), before, strict=True):
            place.node.run("sysctl", "-qw", f"net.netfilter.nf_conntrack_{name}={value}")
