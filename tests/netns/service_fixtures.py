"""Labs whose nodes have proxies, for tests of Services: what is deployed, who is asked, who answered."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from podwire.errors import PodwireError
from podwire.lab import cluster, names, process, state, topology
from podwire.lab.api.kinds import ENDPOINT_SLICES, PODS, SERVICES
from podwire.lab.state import LabState
from podwire.lab.talk import Answer, ask
from tests.netns.lab_fixtures import fresh_name

Object = dict[str, Any]
_marks = itertools.count(1)
PATIENCE = 90.0
BOTH = "10.244.0.0/16,fd00:10:244::/56"


@pytest.fixture(scope="module", params=["nftables", pytest.param("iptables", marks=pytest.mark.slow)])
def proxied(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """A lab of three nodes of both families with proxies, and the Services of `manifests`, ready."""
    lab = cluster.up(LabState(name=fresh_name(), nodes=state.plan_nodes(3, BOTH), pod_cidr=BOTH, proxy=request.param))
    try:
        stage = Stage(lab)
        # One of two tokens that a packet without a way costs its sender (ip_error, icmp_send) would go to every SYN of
        # a client that tries again each second, and none be left to tell it.
        topology.run(
            ["ip", "netns", "exec", names.namespace(lab.name, "balancer"), "sysctl", "-qw", "net.ipv4.icmp_ratelimit=0"]
        )
        servers, *others = manifests()
        stage.apply(servers)  # before there are other pods, whose nodes would then get fewer of them
        stage.apply(*others)
        yield stage
    finally:
        cluster.down(lab.name)


def container(*ports: Object, **more: Any) -> Object:
    """An echo server that is ready once it listens."""
    return {"name": "web", "image": "echo", "ports": list(ports), **more}


def deployment(name: str, replicas: int, *, node: str = "", more: Object | None = None) -> Object:
    """Echo servers on the port `http` (8080) and UDP 5353, on one node or on all."""
    ports = [{"name": "http", "containerPort": 8080}, {"name": "dns", "containerPort": 5353, "protocol": "UDP"}]
    probe = {"httpGet": {"port": "http"}, "periodSeconds": 1}
    spec: Object = {"containers": [container(*ports, readinessProbe=probe, **(more or {}))]}
    if node:
        spec["nodeSelector"] = {"kubernetes.io/hostname": node}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": spec},
        },
    }


def service(name: str, app: str = "web", **spec: Any) -> Object:
    """A Service of both families: TCP 80 to the port `http`, UDP 53 to 5353."""
    ports = [
        {"name": "web", "port": 80, "targetPort": "http"},
        {"name": "dns", "port": 53, "targetPort": 5353, "protocol": "UDP"},
    ]
    selector = {"app": app} if app else None
    whole = {"selector": selector, "ports": ports, "ipFamilyPolicy": "PreferDualStack", **spec}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {key: value for key, value in whole.items() if value is not None}}  # fmt: skip


def manifests() -> list[Object]:
    """Three servers, one a node, behind Services of every type; a client on the first node."""
    client = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "client"},
              "spec": {"nodeName": "node1", "containers": [{"name": "idle", "image": "none"}]}}  # fmt: skip
    return [
        deployment("web", 3),
        deployment("one", 1, node="node2"),
        client,
        service("web", type="NodePort"),
        service("one", "one", type="NodePort", externalTrafficPolicy="Local"),
        service("shared", type="LoadBalancer"),
        service("kept", "one", type="LoadBalancer", externalTrafficPolicy="Local"),
        service("headless", clusterIP="None"),
        service("empty", "nobody"),
        service("sticky", sessionAffinity="ClientIP"),
    ]


class Stage:
    """A lab, and what tests ask of it."""

    def __init__(self, lab: LabState) -> None:
        self.lab = lab
        self.api = cluster.client(lab)

    def apply(self, *objects: Object) -> None:
        """Applies, and waits until all pods are there and ready, and every node's rules know of them."""
        cluster.wait_ready(self.lab, cluster.apply(self.lab, objects))
        cluster.wait_rolled_out(self.lab, objects)
        self.until("all pods to be in their Services' slices", self._is_sliced)
        host = f"192.0.2.{next(_marks)}"
        mark = [service("mark", "", ports=[{"port": 80}], ipFamilyPolicy="SingleStack"), _slice("mark", host)]
        cluster.apply(self.lab, mark)
        # which has come after all the rest, to proxies that take what comes in its order
        self.until("all nodes' rules", lambda: all(host in self._rules(node.name) for node in self.lab.nodes))
        cluster.delete(self.lab, mark)

    def _is_sliced(self) -> bool:
        for each in self.api.list(SERVICES, "default"):
            if selector := each["spec"].get("selector"):
                labels = ",".join(f"{key}={value}" for key, value in selector.items())
                ready = [pod for pod in self.api.list(PODS, "default", labels=labels) if _is_ready(pod)]
                known = [one for one in self.endpoints(each["metadata"]["name"]) if one["conditions"]["ready"]]
                if len(known) != len(ready) * len(each["spec"]["ipFamilies"]):
                    return False
        return True

    def _rules(self, node: str) -> str:
        program = ["nft", "list", "ruleset"] if self.lab.proxy == "nftables" else ["iptables-save"]
        return topology.run(["ip", "netns", "exec", names.namespace(self.lab.name, node), *program])

    def delete(self, *objects: Object) -> None:
        """Deletes, and waits until their pods are gone."""
        cluster.wait_deleted(self.lab, cluster.delete(self.lab, objects))

    def service(self, name: str) -> Object:
        """The Service as the API shows it."""
        return dict(self.api.get(SERVICES, name, "default"))

    def address(self, name: str, family: int = 4) -> str:
        """A ClusterIP."""
        return _of(self.service(name)["spec"]["clusterIPs"], family)

    def balanced(self, name: str, family: int = 4) -> str:
        """A load balancer's address."""
        ingress = self.service(name)["status"]["loadBalancer"]["ingress"]
        return _of([each["ip"] for each in ingress], family)

    def node_port(self, name: str) -> int:
        """The node port of TCP 80."""
        return int(self.service(name)["spec"]["ports"][0]["nodePort"])

    def node(self, name: str, family: int = 4) -> str:
        """A node's own address."""
        return _of(self.lab.node(name).addresses, family)

    def pods(self, app: str) -> dict[str, Object]:
        """Pods that are not on their way out, by name."""
        found = self.api.list(PODS, "default", labels=f"app={app}")
        return {one["metadata"]["name"]: one for one in found if "deletionTimestamp" not in one["metadata"]}

    def endpoints(self, name: str) -> list[Object]:
        """The endpoints of a Service's slices."""
        slices = self.api.list(ENDPOINT_SLICES, "default", labels=f"kubernetes.io/service-name={name}")
        return [endpoint for each in slices for endpoint in each.get("endpoints") or ()]

    def place(self, name: str) -> Path:
        """The network namespace of `client`, `outside` or a node."""
        return self.lab.pod_netns("default", name) if name == "client" else self.lab.netns(name)

    def ask(self, source: str, address: str, port: int = 80, protocol: str = "TCP", seconds: float = 20.0) -> Answer:
        """Asks once."""
        return ask(self.place(source), address, port, protocol, seconds)

    def outcome(self, source: str, address: str, port: int = 80, seconds: float = 0.5) -> str:
        """`answered`, or the kernel's word for why not."""
        try:
            self.ask(source, address, port, seconds=seconds)
        except PodwireError as error:
            return "refused" if "refused" in str(error) else "timed out" if "timed out" in str(error) else str(error)
        return "answered"

    def many(self, source: str, address: str, port: int = 80, times: int = 30) -> Counter[tuple[str, str]]:
        """Who answered, as (pod's app and node, client's address as it was seen)."""
        answers = [self.ask(source, address, port) for _ in range(times)]
        return Counter((f"{answer.pod.split('-')[0]} {answer.node}", answer.client) for answer in answers)

    def until(self, what: str, holds: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Waits until it holds; an answer that does not come means that it does not."""

        def calm() -> bool:
            try:
                return holds()
            except (PodwireError, LookupError):
                return False

        process.wait_for(calm, seconds, what)


def _slice(of: str, host: str) -> Object:
    """One endpoint of a Service without a selector."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": of, "labels": {"kubernetes.io/service-name": of}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 80, "protocol": "TCP"}],
        "endpoints": [{"addresses": [host], "conditions": {"ready": True}}],
    }


def _is_ready(pod: Object) -> bool:
    conditions = pod.get("status", {}).get("conditions") or ()
    ready = any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)
    return ready and "deletionTimestamp" not in pod["metadata"]


def _of(addresses: Any, family: int) -> str:
    return next(str(each) for each in addresses if (":" in each) == (family == 6))
