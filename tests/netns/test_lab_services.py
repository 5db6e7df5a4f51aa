"""Services in a lab with proxies: every type, from a pod, a node and outside, and what changes while clients ask."""

from __future__ import annotations

import ipaddress
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from podwire.errors import PodwireError
from podwire.lab import proxy, status, topology
from podwire.lab.api.kinds import ENDPOINT_SLICES
from podwire.lab.talk import Answer
from tests.netns.service_fixtures import Stage, container, deployment, service

Object = dict[str, Any]
PODS = tuple(ipaddress.ip_network(each) for each in ("10.244.0.0/16", "fd00:10:244::/56"))
EVERYWHERE = {"web node1", "web node2", "web node3"}
ONE = {"one node2"}


class Flow(msgspec.Struct, frozen=True):
    """A client, a Service's place, who may answer, and whom the pod must see: the client `itself`, or some `node`."""

    story: str
    source: str
    service: str
    place: str
    answered_by: set[str]
    seen: str


FLOWS = (
    Flow("a pod asks a ClusterIP", "client", "web", "cluster", EVERYWHERE, "itself"),
    Flow("a node asks a ClusterIP", "node3", "web", "cluster", EVERYWHERE, "node"),
    Flow("from outside to a node port", "outside", "web", "node1", EVERYWHERE, "node"),
    Flow("a pod asks its own node's port", "client", "web", "node1", EVERYWHERE, "node"),
    Flow("a node asks another's port", "node1", "web", "node2", EVERYWHERE, "node"),
    Flow("Local, at the node that has the pod", "outside", "one", "node2", ONE, "itself"),
    Flow("Local, a pod asks a node without the pod", "client", "one", "node1", ONE, "itself"),
    Flow("balanced over nodes and pods", "outside", "shared", "balanced", EVERYWHERE, "node"),
    Flow("balanced to the node that has the pod", "outside", "kept", "balanced", ONE, "itself"),
    Flow("a pod asks a balanced address: no way round", "client", "kept", "balanced", ONE, "itself"),
    Flow("a node asks a balanced address", "node1", "shared", "balanced", EVERYWHERE, "node"),
)


def place_of(stage: Stage, flow: Flow, family: int) -> tuple[str, int]:
    if flow.place == "cluster":
        return stage.address(flow.service, family), 80
    if flow.place == "balanced":
        return stage.balanced(flow.service, family), 80
    return stage.node(flow.place, family), stage.node_port(flow.service)


def is_seen(answer: Answer, wanted: str) -> bool:
    """A node is seen as its own address or, by pods of other nodes, as one that it has among the pods'."""
    if wanted == "itself":
        return answer.client == answer.own
    return answer.client != answer.own or ipaddress.ip_address(answer.client) not in PODS[":" in answer.client]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.story)
def test_who_answers_and_whom_the_pod_sees(proxied: Stage, flow: Flow, family: int) -> None:
    address, port = place_of(proxied, flow, family)
    proxied.until("the place to be there", lambda: proxied.ask(flow.source, address, port).pod != "")
    answers = [proxied.ask(flow.source, address, port) for _ in range(30)]
    assert {f"{each.pod.split('-')[0]} {each.node}" for each in answers} == flow.answered_by
    assert [each for each in answers if not is_seen(each, flow.seen)] == []


def test_datagrams_go_the_same_way(proxied: Stage) -> None:
    for source, address, port in (
        ("client", proxied.address("web"), 53),
        ("outside", proxied.node("node3"), proxied.service("web")["spec"]["ports"][1]["nodePort"]),
        ("outside", proxied.balanced("shared"), 53),
    ):
        assert proxied.ask(source, address, port, "UDP").protocol == "UDP"


def test_what_has_nobody_is_refused_and_what_has_nobody_here_is_dropped(proxied: Stage) -> None:
    empty, one = proxied.address("empty"), proxied.node_port("one")
    assert proxied.outcome("client", empty, seconds=20) == "refused"
    assert proxied.outcome("node2", empty, seconds=20) == "refused"
    seconds, no_such_port = (20, "refused") if proxied.lab.proxy == "nftables" else (0.5, "timed out")
    assert proxied.outcome("client", proxied.address("web"), 81, seconds) == no_such_port
    assert proxied.outcome("outside", proxied.node("node1"), one) == "timed out", "Local, without a pod there"
    proxied.until(
        # An ICMP error that comes while connect() still has the socket to itself is not told (tcp_v4_err): the second
        # SYN, a second later, meets no such thing.
        "an address that no Service has to have no way",
        lambda: "No route to host" in proxied.outcome("outside", "198.51.100.126", seconds=3.5),
    )


def test_a_headless_service_has_endpoints_and_no_address(proxied: Stage) -> None:
    assert proxied.service("headless")["spec"]["clusterIPs"] == ["None"]
    addresses = {address for each in proxied.endpoints("headless") for address in each["addresses"]}
    pods = {entry["ip"] for pod in proxied.pods("web").values() for entry in pod["status"]["podIPs"]}
    assert addresses == pods, "both families"


def test_a_client_keeps_its_endpoint(proxied: Stage) -> None:
    for source in ("client", "node1"):
        assert len(proxied.many(source, proxied.address("sticky"), times=12)) == 1


def test_pods_whose_port_of_a_name_is_another_number_answer_alike(proxied: Stage) -> None:
    pods = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"named{number}", "labels": {"app": "named"}},
            "spec": {"containers": [container({"name": "http", "containerPort": number})]},
        }
        for number in (8081, 8082)
    ]
    objects = [*pods, service("named", "named", ports=[{"port": 80, "targetPort": "http"}])]
    proxied.apply(*objects)
    try:
        address = proxied.address("named")
        proxied.until("both", lambda: {proxied.ask("client", address).port for _ in range(12)} == {8081, 8082})
        slices = proxied.api.list(ENDPOINT_SLICES, "default", labels="kubernetes.io/service-name=named")
        assert len(slices) == 4, "for each number and family one"
    finally:
        proxied.delete(*objects)


def test_a_pod_that_is_not_ready_gets_no_connection(proxied: Stage, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    probe = {"exec": {"command": ["test", "-e", str(ready)]}, "periodSeconds": 1, "failureThreshold": 1}
    flips = deployment("flips", 1, node="node3")
    flips["spec"]["template"]["spec"]["containers"][0]["readinessProbe"] = probe
    objects = [flips, service("flips", "flips")]
    ready.touch()
    proxied.apply(*objects)
    try:
        address = proxied.address("flips")
        proxied.until("the ready pod to answer", lambda: proxied.outcome("client", address) == "answered")
        ready.unlink()
        proxied.until("it to be refused", lambda: proxied.outcome("client", address) == "refused")
        assert [each["conditions"]["ready"] for each in proxied.endpoints("flips")] == [False, False]
        ready.touch()
        proxied.until("it to answer again", lambda: proxied.outcome("client", address) == "answered")
    finally:
        proxied.delete(*objects)


class Load:
    """Connections from the client pod, one after the other, until it ends."""

    def __init__(self, stage: Stage, address: str) -> None:
        self.failures: list[str] = []
        self.pods: list[str] = []
        self._stage, self._address = stage, address
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self.pods.append(self._stage.ask("client", self._address).pod)
            except PodwireError as error:
                self.failures.append(str(error))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def test_scaling_down_loses_no_connection_of_pods_that_wait_before_they_end(proxied: Stage) -> None:
    """The pods leave the rules as soon as they are being deleted; their preStop hook gives that the time it takes."""
    waits = {"lifecycle": {"preStop": {"sleep": {"seconds": 6}}}}
    objects = [deployment("drains", 4, more=waits), service("drains", "drains")]
    proxied.apply(*objects)
    try:
        address = proxied.address("drains")
        proxied.until("all four", lambda: len({proxied.ask("client", address).pod for _ in range(24)}) == 4)
        with Load(proxied, address) as load:
            proxied.apply(deployment("drains", 1, more=waits))
            proxied.until("three to be gone", lambda: len(proxied.endpoints("drains")) == 2)
        assert load.failures == []
        assert len(load.pods) > 20
    finally:
        proxied.delete(*objects)


# --- the balancer -----------------------------------------------------------------------------------------------


def hops(stage: Stage, service_name: str) -> set[str]:
    """The nodes over which the balancer spreads a Service."""
    netns = f"pw.{stage.lab.name}.balancer"
    route = topology.run(["ip", "-n", netns, "route", "show", stage.balanced(service_name)])
    addresses = {node.addresses[0]: node.name for node in stage.lab.nodes}
    return {addresses[word] for word in route.split() if word in addresses}


def test_the_balancer_follows_pods_and_proxies(proxied: Stage) -> None:
    everywhere = {node.name for node in proxied.lab.nodes}
    proxied.until("all nodes", lambda: hops(proxied, "shared") == everywhere)
    proxied.until("the node with the pod", lambda: hops(proxied, "kept") == {"node2"})
    proxied.apply(deployment("one", 1, node="node3"))
    try:
        proxied.until("the pod's new node", lambda: hops(proxied, "kept") == {"node3"})
        answer = proxied.ask("outside", proxied.balanced("kept"))
        assert (answer.node, answer.untranslated) == ("node3", True)
        proxy.end(proxied.lab, "node1")
        try:
            proxied.until("node1 to be left out", lambda: hops(proxied, "shared") == everywhere - {"node1"})
            assert set(proxied.many("outside", proxied.balanced("shared"))), "everybody is answered"
            outcome = proxied.outcome("client", proxied.address("web"), seconds=20)
            assert outcome == "answered", "rules outlive the proxy"
            shown = {each["name"]: each["proxy"]["healthy"] for each in status.status(proxied.lab)["nodes"]}
            assert shown == {"node1": False, "node2": True, "node3": True}
        finally:
            proxy.start(proxied.lab, "node1")
        proxy.wait_healthy(proxied.lab, proxied.lab.node("node1"))
        proxied.until("all nodes again", lambda: hops(proxied, "shared") == everywhere)
    finally:
        proxied.apply(deployment("one", 1, node="node2"))
        proxied.until("the pod that moved to be gone", lambda: len(proxied.endpoints("kept")) == 2)


# --- looking at it ----------------------------------------------------------------------------------------------


def needs_elements(stage: Stage) -> None:
    if stage.lab.proxy != "nftables":
        pytest.skip("a trace is held against the kernel in nftables mode alone")


def podwire(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "podwire.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_status_tells_of_services(proxied: Stage) -> None:
    shown = {one["name"]: one for one in status.status(proxied.lab)["services"]}
    kept, nobody = shown["kept"], shown["empty"]
    assert (kept["type"], len(kept["cluster_ips"]), len(kept["load_balancer"]), len(kept["node_ports"])) == (
        "LoadBalancer", 2, 2, 2,
    )  # fmt: skip
    assert {(one["node"], one["ready"], one["terminating"]) for one in kept["endpoints"]} == {("node2", True, False)}
    assert {one["pod"] for one in kept["endpoints"]} == set(proxied.pods("one"))
    assert nobody["endpoints"] == []


@pytest.mark.parametrize(
    ("origin", "target", "wanted"),
    [
        ("client", "web:80", ["node1: ClusterIP of default/web:web TCP: to one of 3 endpoints, seen as 10.244."]),
        ("node2", "sticky:80", ["a client keeps its own for 10800 s, seen as an address of node2"]),
        ("client", "empty:80", ["refused: it has no endpoints", "goto refuse"]),
        ("client", "web:81", ["refused: the Service of 10.96."]),
        ("outside", "{kept}:80", ["balancer: one of node2,", "node2: load balancer's address", "services_external"]),
        ("outside", "{node1}:{one}", ["dropped: it is Local, and node1 has no endpoint", "nodeports_external"]),
        ("client", "{node2}:{web}", ["node1: no Service here: goes on to node2", "node2: NodePort of default/web:web"]),
        ("client", "[{kept6}]:80", ["ip6 podwire_proxy services", "to its only endpoint"]),
    ],
)
def test_a_trace_says_where_a_connection_goes_and_the_kernel_agrees(
    proxied: Stage, origin: str, target: str, wanted: list[str]
) -> None:
    needs_elements(proxied)
    where = target.format(
        kept=proxied.balanced("kept"), kept6=proxied.balanced("kept", 6), node1=proxied.node("node1"),
        node2=proxied.node("node2"), one=proxied.node_port("one"), web=proxied.node_port("web"),
    )  # fmt: skip
    words = ("service", "trace", "--name", proxied.lab.name, origin, where)

    said = ""

    def agrees() -> bool:  # pods of other tests come and go, and the kernel follows a moment later
        nonlocal said
        done = podwire(*words)
        said = done.stdout
        return done.returncode == 0 and "DIFFERS" not in said

    proxied.until("the kernel to agree", agrees)
    assert [text for text in wanted if text not in said] == []


def test_a_trace_notices_a_kernel_that_differs(proxied: Stage) -> None:
    needs_elements(proxied)
    proxy.end(proxied.lab, "node1")
    try:
        key = f"{{ {proxied.address('empty')} . 6 . 80 }}"
        netns = f"pw.{proxied.lab.name}.node1"
        topology.run(["ip", "netns", "exec", netns, "nft", "delete", "element", "ip", "podwire_proxy", "services", key])
        found = podwire("service", "trace", "--name", proxied.lab.name, "client", "empty:80")
        assert found.returncode == 1
        assert "DIFFERS: services should say goto refuse, and says nothing" in found.stdout
    finally:
        proxy.start(proxied.lab, "node1")
        proxy.wait_healthy(proxied.lab, proxied.lab.node("node1"))


def test_a_list_and_a_service_as_a_node_sees_it(proxied: Stage) -> None:
    found = podwire("service", "list", "--name", proxied.lab.name, "-o", "json")
    names = [one["name"] for one in json.loads(found.stdout)["services"]]
    assert {"web", "kept", "headless", "empty"} <= set(names)
    for node, here in (("node2", 1), ("node1", 0)):
        words = ("service", "show", "kept", "--name", proxied.lab.name, "--node", node, "-o", "json")
        shown = json.loads(podwire(*words).stdout)
        places = {(one["kind"], one["external"]) for one in shown["plans"][0]["frontends"]}
        assert shown["health"]["ready"] == here
        assert ("NodePort", "1 as it is" if here else "dropped") in places
    assert "there is no Service default/none" in podwire("service", "show", "none", "--name", proxied.lab.name).stderr
