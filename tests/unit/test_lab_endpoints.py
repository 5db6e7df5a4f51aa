"""EndpointSlices and load balancers' addresses in a lab: what is planned, and what comes of plans carried out."""

from __future__ import annotations

from typing import Any

import pytest

from podwire.lab import names
from podwire.lab.api.kinds import ENDPOINT_SLICES, NODES, PODS, SERVICE_CIDRS, SERVICES
from podwire.lab.api.store import Store
from podwire.lab.controllers import Controllers
from podwire.lab.endpoints import MANAGED_BY, ZONE_LABEL
from podwire.lab.load_balancers import Check, check_of, plan_commands, plan_groups
from podwire.lab.state import plan_nodes

Object = dict[str, Any]
BALANCED = [names.BALANCED[4], names.BALANCED[6]]


class World:
    """A store with controllers, and pods in the state that a test says."""

    def __init__(self, *cidrs: str) -> None:
        self.store = Store()
        self.controllers = Controllers(self.store, balanced=BALANCED)
        self.writes = 0
        spec = {"cidrs": list(cidrs or ("10.96.0.0/16",))}
        self.store.create(SERVICE_CIDRS, {"metadata": {"name": "kubernetes"}, "spec": spec})

    def look(self) -> None:
        """Passes until one changes nothing; that must come soon. `writes`: of slices."""
        self.writes = 0
        for _ in range(6):
            version = self.store.version
            self.controllers.look()
            changes = self.store.log.after(version)
            self.writes += sum(change.kind is ENDPOINT_SLICES for change in changes)
            if not changes:
                return
        raise AssertionError("six passes, and still something to do")

    def service(self, name: str = "web", labels: Object | None = None, **spec: Any) -> Object:
        whole = {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}], **spec}
        return self.store.create(SERVICES, {"metadata": {"name": name, "labels": labels or {}}, "spec": whole})

    def pod(self, number: int, state: str = "ready", node: str = "node1", port: int = 8080, **spec: Any) -> None:
        """`state`: ready, unready, going (ready, and being deleted), ended, or nowhere (no address yet)."""
        name = f"pod{number}"
        if self.store.find(PODS, name, "default") is None:
            container = {"name": "web", "ports": [{"name": "http", "containerPort": port}]}
            whole = {"nodeName": node, "containers": [container], **spec}
            self.store.create(PODS, {"metadata": {"name": name, "labels": {"app": "web"}}, "spec": whole})
        ready = {"type": "Ready", "status": str(state in ("ready", "going", "ended"))}
        addresses = [f"10.244.{number // 200}.{number % 200 + 2}", f"fd00:10:244::{number + 2:x}"]
        status: Object = {"phase": "Succeeded" if state == "ended" else "Running", "conditions": [ready]}
        if state != "nowhere":
            status |= {"podIP": addresses[0], "podIPs": [{"ip": address} for address in addresses]}
        self.store.set_status(PODS, name, "default", status)
        if state == "going":
            self.store.delete(PODS, name, "default")

    def slices(self, service: str = "web") -> list[Object]:
        found = self.store.list(ENDPOINT_SLICES)
        return [one for one in found if one["metadata"]["labels"].get("kubernetes.io/service-name") == service]

    def endpoints(self, service: str = "web") -> list[Object]:
        return [endpoint for each in self.slices(service) for endpoint in each["endpoints"]]


STATES = {
    "ready": {"ready": True, "serving": True, "terminating": False},
    "unready": {"ready": False, "serving": False, "terminating": False},
    "going": {"ready": False, "serving": True, "terminating": True},
    "ended": None,
    "nowhere": None,
}


@pytest.mark.parametrize("state", STATES)
def test_what_is_said_of_a_pod(state: str) -> None:
    world = World()
    world.service()
    world.pod(1, state)
    world.look()
    wanted = STATES[state]
    assert [endpoint["conditions"] for endpoint in world.endpoints()] == ([wanted] if wanted else [])


def test_whoever_publishes_what_is_not_ready_has_it_ready() -> None:
    world = World()
    world.service(publishNotReadyAddresses=True)
    world.pod(1, "unready")
    world.look()
    assert world.endpoints()[0]["conditions"] == {"ready": True, "serving": False, "terminating": False}


def test_a_slice_says_whose_it_is_and_where_its_pods_are() -> None:
    world = World("10.96.0.0/16", "fd00:10:96::/108")
    world.store.create(NODES, {"metadata": {"name": "node1", "labels": {ZONE_LABEL: "east"}}})
    world.service(labels={"team": "a"}, ipFamilyPolicy="PreferDualStack", clusterIP="None")
    world.pod(1)
    world.look()
    assert [each["addressType"] for each in sorted(world.slices(), key=lambda one: one["addressType"])] == [
        "IPv4",
        "IPv6",
    ]
    found = world.slices()[0]
    labels = found["metadata"]["labels"]
    assert (labels["team"], labels["service.kubernetes.io/headless"], labels[MANAGED_BY]) == (
        "a", "", "endpointslice-controller.k8s.io",
    )  # fmt: skip
    assert (found["endpoints"][0]["nodeName"], found["endpoints"][0]["zone"]) == ("node1", "east")
    assert found["endpoints"][0]["targetRef"]["name"] == "pod1"
    assert found["ports"] == [{"name": "", "port": 8080, "protocol": "TCP"}]


def test_a_name_means_each_pods_own_number() -> None:
    world = World()
    world.service(ports=[{"port": 80, "targetPort": "http"}])
    world.pod(1, port=8080)
    world.pod(2, port=9090)
    world.pod(3, port=9090)
    world.look()
    assert sorted((each["ports"][0]["port"], len(each["endpoints"])) for each in world.slices()) == [
        (8080, 1),
        (9090, 2),
    ]


@pytest.mark.parametrize(
    ("distribution", "hints"),
    [
        (None, None),
        ("PreferClose", {"forZones": [{"name": "east"}]}),
        ("PreferSameZone", {"forZones": [{"name": "east"}]}),
        ("PreferSameNode", {"forZones": [{"name": "east"}], "forNodes": [{"name": "node1"}]}),
    ],
)
def test_hints(distribution: str | None, hints: Object | None) -> None:
    world = World()
    world.store.create(NODES, {"metadata": {"name": "node1", "labels": {ZONE_LABEL: "east"}}})
    asked: Object = {"trafficDistribution": distribution} if distribution else {}
    world.service(**asked)
    world.pod(1)
    world.pod(2, "unready")
    world.look()
    assert [endpoint.get("hints") for endpoint in world.endpoints()] == [hints, None]


def test_slices_hold_a_hundred_and_a_change_touches_one() -> None:
    world = World()
    world.service()
    for number in range(230):
        world.pod(number)
    world.look()
    assert sorted(len(each["endpoints"]) for each in world.slices()) == [30, 100, 100]
    world.pod(5, "unready")
    world.look()
    assert world.writes == 1
    world.pod(300)
    world.look()
    assert (world.writes, len(world.slices())) == (1, 3), "there was room"
    world.look()
    assert world.writes == 0


def test_slices_go_with_their_pods_and_with_their_service_and_others_stay() -> None:
    world = World()
    world.service()
    own = {"metadata": {"name": "mine", "labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPv4",
           "endpoints": [{"addresses": ["192.0.2.1"]}]}  # fmt: skip
    world.store.create(ENDPOINT_SLICES, own)
    world.pod(1)
    world.look()
    assert len(world.slices()) == 2
    world.pod(1, "ended")
    world.look()
    assert [each["metadata"]["name"] for each in world.slices()] == ["mine"]
    world.pod(2)
    world.look()
    world.store.delete(SERVICES, "web", "default")
    world.look()
    assert [each["metadata"]["name"] for each in world.slices()] == ["mine"]


def test_a_service_without_a_selector_is_left_to_its_author() -> None:
    world = World()
    world.service(selector={})
    world.pod(1)
    world.look()
    assert world.slices() == []


# --- load balancers ---------------------------------------------------------------------------------------------


def ingress(world: World, name: str) -> list[str]:
    status = world.store.get(SERVICES, name, "default").get("status") or {}
    return [each["ip"] for each in (status.get("loadBalancer") or {}).get("ingress") or ()]


def test_balancers_get_addresses_of_their_families_and_give_them_up() -> None:
    world = World("10.96.0.0/16", "fd00:10:96::/108")
    for name in ("a", "b", "c"):
        world.service(name, type="LoadBalancer", ipFamilyPolicy="PreferDualStack")
    world.service("asks", type="LoadBalancer", loadBalancerIP="198.51.100.99")
    world.service("foreign", type="LoadBalancer", loadBalancerClass="example.org/metal")
    world.look()
    given = [address for name in ("a", "b", "c", "asks") for address in ingress(world, name)]
    assert (len(given), len(set(given)), ingress(world, "asks")) == (7, 7, ["198.51.100.99"])
    assert ingress(world, "foreign") == []
    before = ingress(world, "a")
    world.store.modify(SERVICES, "a", "default", lambda obj: {**obj, "spec": {**obj["spec"], "type": "NodePort"}})
    world.look()
    assert ingress(world, "a") == []
    world.store.modify(SERVICES, "a", "default", lambda obj: {**obj, "spec": {**obj["spec"], "type": "LoadBalancer"}})
    world.look()
    assert ingress(world, "a") == before, "what was free is found again"


def test_an_address_that_another_has_is_not_given_twice() -> None:
    world = World()
    for name in ("first", "second"):
        world.service(name, type="LoadBalancer", loadBalancerIP="198.51.100.99")
    world.look()
    assert sorted([ingress(world, "first"), ingress(world, "second")]) == [[], ["198.51.100.99"]]


def test_groups_follow_health_and_commands_follow_groups() -> None:
    nodes = plan_nodes(3, "10.244.0.0/16,fd00:10:244::/56")
    given = [{"ip": "198.51.100.70"}, {"ip": "2001:db8:51::1:7"}]
    service: Object = {"spec": {"type": "LoadBalancer"}, "status": {"loadBalancer": {"ingress": given}}}
    local: Object = {**service, "spec": {"type": "LoadBalancer", "healthCheckNodePort": 30123}}
    assert (check_of(service), check_of(local)) == (Check(10256, "/healthz"), Check(30123, "/"))
    healthy = {Check(10256, "/healthz"): frozenset({"node1", "node3"}), Check(30123, "/"): frozenset[str]()}
    groups = plan_groups([service], nodes, healthy)
    assert groups == {"198.51.100.70": (1, 5), "2001:db8:51::1:7": (2, 6)}
    assert plan_groups([local], nodes, healthy) == {"198.51.100.70": (), "2001:db8:51::1:7": ()}
    ids = {"198.51.100.70": 1000, "2001:db8:51::1:7": 1001}
    fresh = plan_commands({}, groups, ids)
    assert [line.split()[:4] for line in fresh if "1000" in line] == [
        ["nexthop", "replace", "id", "1000"], ["route", "replace", "198.51.100.70", "nhid"],
    ]  # fmt: skip
    fewer = plan_commands(groups, groups | {"198.51.100.70": (5,)}, ids)
    assert len(fewer) == 1
    assert "group 5 type resilient" in fewer[0]
    assert plan_commands(groups, {}, ids) == ["nexthop del id 1000", "nexthop del id 1001"]
    assert plan_commands(groups, groups, ids) == []
