"""What policies and Services say holds on the fast path as it does beside it: with real proxies, in each mode.

client ─┬─▶ near (node1)     labels app=near …
        ├─▶ far  (node2)
        └─▶ bystander (node1), whom nothing of it concerns
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from operator import gt
from typing import Any

import pytest

from podwire.lab import cluster, names
from podwire.lab.api.kinds import SERVICES
from podwire.lab.state import LabState
from tests.netns.busy_flows import (
    BARELY,
    PORT,
    TCP,
    UDP,
    Busy,
    Echo,
    metric,
    moments,
    nothing_since,
    quick_lab,
    share,
    taken,
    undisturbed,
    until_fast,
)
from tests.netns.containers import wait
from tests.netns.lab_fixtures import Pods

Object = dict[str, Any]
PLACES = {"client": "node1", "near": "node1", "bystander": "node1", "far": "node2"}


def pod(name: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"nodeName": PLACES[name], "containers": [{"name": "idle", "image": "none"}]},
    }


def service(app: str) -> Object:
    ports = [{"name": kind.lower(), "port": 80, "targetPort": PORT, "protocol": kind} for kind in ("TCP", "UDP")]
    spec = {"selector": {"app": app}, "ports": ports, "ipFamilyPolicy": "PreferDualStack"}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": app}, "spec": spec}


def policy(name: str, app: str, *ports: Object, types: tuple[str, ...] = ("Ingress",)) -> Object:
    """Lets anybody in at these ports, and nowhere else; with `Egress` among its types nothing out but answers."""
    spec = {"podSelector": {"matchLabels": {"app": app}}, "ingress": [{"ports": list(ports)}] if ports else []}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": {**spec, "policyTypes": list(types)},
    }


class Place:
    """The lab, its pods, and an echo in each of them."""

    def __init__(self, lab: LabState, pods: Pods, echoes: dict[str, Echo]) -> None:
        self.lab, self.pods, self.echoes = lab, pods, echoes
        self.at = {name: self._addresses(name) for name in PLACES}
        self.cluster_ip = {name: self._services(name) for name in ("near", "far", "client")}

    def netns(self, name: str) -> str:
        return str(self.lab.pod_netns("default", name))

    def begin(self, to: str, kind: int, port: int = PORT, own_port: int = 0) -> Busy:
        """A connection of the client's."""
        return Busy(self.netns("client"), to, kind, port, own_port)

    def cut(self, name: str) -> int:
        """How many connections the proxy of a node says it has cut."""
        return metric(self.lab, name, names.PROXY_METRICS_PORT, "podwire_policy_cut_connections_total")

    def generations(self) -> list[int]:
        """How often the proxies have brought policies to the kernel."""
        what = "podwire_policy_generations_total"
        return [metric(self.lab, each.name, names.PROXY_METRICS_PORT, what) for each in self.lab.nodes]

    @contextlib.contextmanager
    def having(self, *objects: Object) -> Iterator[None]:
        """With these, which every kernel has when the block begins, and has no more after it."""
        with self._taken_up():
            cluster.apply(self.lab, objects)
        try:
            yield
        finally:
            with self._taken_up():
                cluster.delete(self.lab, objects)

    @contextlib.contextmanager
    def _taken_up(self) -> Iterator[None]:
        """A change of the policies, and nothing of it is left to be done: a proxy that has something left may judge
        connections by it already."""
        before = self.generations()
        yield
        wait(lambda: all(map(gt, self.generations(), before)), "the policies in the kernel")

    def _addresses(self, name: str) -> dict[int, str]:
        found = self.pods.object(name)["status"]["podIPs"]
        return {6 if ":" in each["ip"] else 4: each["ip"] for each in found}

    def _services(self, name: str) -> dict[int, str]:
        found = cluster.client(self.lab).get(SERVICES, name, "default")["spec"]["clusterIPs"]
        return {6 if ":" in each else 4: each for each in found}


@pytest.fixture(scope="module", params=["nftables", pytest.param("iptables", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with quick_lab(request.param) as lab, Pods(lab, [pod(name) for name in PLACES]) as pods:
        cluster.apply(lab, [service(name) for name in ("near", "far", "client")])
        with contextlib.ExitStack() as stack:
            made = Place(lab, pods, {})
            for name in PLACES:
                made.echoes[name] = stack.enter_context(Echo(made.netns(name)))
            yield made


def fast(place: Place, stack: contextlib.ExitStack, *ends: tuple[str, int, int]) -> list[Busy]:
    """Connections of the client's to these pods, fast."""
    made = [stack.enter_context(place.begin(place.at[name][family], kind)) for name, family, kind in ends]
    until_fast(place.lab, *made)
    return made


# --- policies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["near", "far"])
def test_a_policy_cuts_what_it_forbids_and_nothing_else(place: Place, target: str) -> None:
    with contextlib.ExitStack() as stack:
        other = "far" if target == "near" else "near"
        steady = fast(place, stack, ("bystander", 4, UDP), (other, 6, TCP), (other, 4, UDP))
        forbidden = fast(place, stack, (target, 4, TCP), (target, 6, UDP), (target, 6, TCP), (target, 4, UDP))
        on, echo = PLACES[target], place.echoes[target]
        with undisturbed(*steady):
            open_ports = [{"port": PORT, "protocol": each} for each in ("TCP", "UDP")]
            with undisturbed(*forbidden), place.having(policy("lets-it", target, *open_ports)):
                until_fast(place.lab, *forbidden)
            before = place.cut(on)
            # An answer on its way while the connection is cut would begin one itself, were it allowed to.
            both, only = ("Ingress", "Egress"), {"port": PORT + 1, "protocol": "TCP"}
            with place.having(policy("forbids-it", target, only, types=both)):
                wait(lambda: place.cut(on) >= before + 4, "the proxy to have cut them")
                since = moments(*forbidden)
                assert nothing_since(echo, since) == {}
        for each in forbidden:  # it is allowed again: TCP tries again by itself, the longer it was silent the later
            each.is_answered()
        until_fast(place.lab, *forbidden)


# --- Services -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [UDP, TCP], ids=["UDP", "TCP"])
@pytest.mark.parametrize("target", ["near", "far"])
def test_a_service_is_answered_as_itself_beside_a_direct_connection(place: Place, target: str, kind: int) -> None:
    """From one port to the same endpoint, by the Service and directly, whichever was first: each has its own answers,
    and the direct one alone is fast."""
    family = 4 if kind == UDP else 6
    to, direct_to = place.cluster_ip[target][family], place.at[target][family]
    nodes = sorted({"node1", PLACES[target]})

    def counted() -> int:
        """On the node that translates; the other one sees a connection between two pods."""
        return taken(place.lab, "node1")

    wait(lambda: reaches(place, to, kind), "the Service to be there")
    port = 7020 + 10 * (kind == TCP) + 100 * (target == "far")
    with place.begin(direct_to, kind, PORT, port) as direct:
        until_fast(place.lab, direct, at=nodes)
        with place.begin(to, kind, 80, port) as by_service:
            by_service.is_answered()
            assert share(by_service, counted) < BARELY
            with undisturbed(direct, by_service):
                until_fast(place.lab, direct, at=nodes)
    with place.begin(to, kind, 80, port + 1) as by_service:
        by_service.is_answered()
        with place.begin(direct_to, kind, PORT, port + 1) as direct, undisturbed(by_service):
            direct.is_answered()
            assert share(by_service, counted) < BARELY
            assert direct.lost(2) == []


def reaches(place: Place, to: str, kind: int) -> bool:
    """Whether a Service answers."""
    try:
        with place.begin(to, kind, 80) as asking:
            asking.goes_on(20)
            return bool(asking.answered)
    except OSError:
        return False


def test_a_pod_that_asks_its_own_service(place: Place) -> None:
    """It is seen as its node, and answered; beside a connection of its node's that is fast."""
    for family in (4, 6):
        to = place.cluster_ip["client"][family]
        wait(lambda to=to: reaches(place, to, UDP), "the Service to be there")  # type: ignore[misc]
        with place.begin(to, UDP, 80) as udp, place.begin(to, TCP, 80) as tcp, undisturbed(udp, tcp):
            assert share(udp, lambda: taken(place.lab, "node1")) < BARELY
            assert share(tcp, lambda: taken(place.lab, "node1")) < BARELY
        assert place.at["client"][family] not in place.echoes["client"].peers
