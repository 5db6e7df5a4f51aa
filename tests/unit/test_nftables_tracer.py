"""What the rules of the nftables mode do with a packet is what the model says: every flow of the matrix, traced."""

from __future__ import annotations

import ipaddress

import msgspec
import pytest

from kube_proxy_lite.apply.nftables_fake import FakeNft
from kube_proxy_lite.model import (
    Frontend,
    FrontendKind,
    PortPlan,
    Protocol,
    Settings,
    Source,
    Verdict,
    decide,
)
from kube_proxy_lite.render.nftables import NftablesRenderer
from kube_proxy_lite.render.nftables_elements import endpoint_text
from kube_proxy_lite.render.nftables_layout import WORDS, BadInterface
from kube_proxy_lite.render.nftables_tracer import Outcome, Packet, UnknownRule, trace
from tests.unit.service_cases import (
    CLIENTS,
    INTERFACES,
    LOCAL,
    NODE,
    REMOTE,
    SETTINGS,
    VARIANTS,
    address,
    flows,
    network,
    plan,
)


def kernel(*plans: PortPlan, settings: Settings = SETTINGS) -> FakeNft:
    """A kernel that has these plans and nothing else."""
    renderer, fake = NftablesRenderer(settings), FakeNft()
    renderer.update({each.key: each for each in plans}, {})
    fake.commit(renderer.resync(fake.listing()))
    return fake


def outcomes(fake: FakeNft, version: int, **packet: object) -> frozenset[Outcome]:
    return trace(fake.tables[WORDS[version].table], Packet(**packet), NODE[version])  # type: ignore[arg-type]


def expected(made: PortPlan, frontend: Frontend, source: Source, settings: Settings) -> frozenset[Outcome]:
    decision = decide(made, frontend, source, settings)
    if decision.verdict is not Verdict.FORWARD:
        return frozenset({Outcome(decision.verdict.value)})
    return frozenset(
        Outcome("accept", endpoint_text(each), decision.masquerade, made.affinity) for each in decision.backends
    )


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("affinity", [0, 10800])
def test_every_flow_of_the_matrix(settings: Settings, affinity: int) -> None:
    wrong = {}
    for name, made, frontend, source in flows():
        made = msgspec.structs.replace(made, affinity=affinity)
        version = made.key.version
        got = outcomes(
            kernel(made, settings=settings),
            version,
            source=address(CLIENTS[source], version),
            destination=frontend.address or address("10.0.1.1", version),
            protocol=made.key.protocol,
            port=frontend.port,
            interface=INTERFACES[source],
        )
        if got != expected(made, frontend, source, settings):
            wrong[name] = (got, expected(made, frontend, source, settings))
    assert wrong == {}


RANGED = plan(ranges=("192.0.2.0/24", "10.0.0.0/16"), external_local=True)
SETTINGS_OF_SOME = msgspec.structs.replace(SETTINGS, node_port_addresses=(ipaddress.ip_network("10.0.0.0/24"),))

TRACES: dict[str, tuple[Settings, PortPlan, dict[str, str | int], set[Outcome]]] = {
    "a pod that gets to itself is masqueraded": (
        SETTINGS,
        plan(cluster=(LOCAL,)),
        {"source": LOCAL, "destination": "10.96.0.1", "port": 80, "interface": "pw0"},
        {Outcome("accept", f"{LOCAL} . 8080", masquerade=True)},
    ),
    "a pod that gets to another is not": (
        SETTINGS,
        plan(cluster=(LOCAL, REMOTE)),
        {"source": REMOTE, "destination": "10.96.0.1", "port": 80, "interface": "pw0"},
        {Outcome("accept", f"{LOCAL} . 8080"), Outcome("accept", f"{REMOTE} . 8080")},
    ),
    "a port that a ClusterIP does not have is refused": (
        SETTINGS,
        plan(),
        {"source": LOCAL, "destination": "10.96.0.1", "port": 81, "interface": "pw0"},
        {Outcome("refuse")},
    ),
    "a ClusterIP that nobody has is dropped": (
        SETTINGS,
        plan(),
        {"source": LOCAL, "destination": "10.96.0.2", "port": 80, "interface": "pw0"},
        {Outcome("drop")},
    ),
    "a node that speaks from an address of its pods needs no other": (
        SETTINGS,
        plan(cluster=(LOCAL,), external_local=True),
        {"source": "10.244.1.1", "destination": "203.0.113.1", "port": 80, "interface": ""},
        {Outcome("accept", f"{LOCAL} . 8080")},
    ),
    "other traffic passes": (
        SETTINGS,
        plan(),
        {"source": LOCAL, "destination": "192.0.2.7", "port": 80, "interface": "pw0"},
        {Outcome("accept")},
    ),
    "a node's port that is nobody's passes": (
        SETTINGS,
        plan(),
        {"source": "192.0.2.7", "destination": "10.0.0.1", "port": 22, "interface": "eth0"},
        {Outcome("accept")},
    ),
    "a NodePort's number on another machine passes": (
        SETTINGS,
        plan(),
        {"source": LOCAL, "destination": "10.0.0.2", "port": 30001, "interface": "pw0"},
        {Outcome("accept")},
    ),
    "a NodePort on an address that is not for NodePorts passes": (
        SETTINGS_OF_SOME,
        plan(),
        {"source": "192.0.2.7", "destination": "10.0.1.1", "port": 30001, "interface": "eth0"},
        {Outcome("accept")},
    ),
    "a NodePort on an address that is": (
        SETTINGS_OF_SOME,
        plan(cluster=(LOCAL,)),
        {"source": "192.0.2.7", "destination": "10.0.0.1", "port": 30001, "interface": "eth0"},
        {Outcome("accept", f"{LOCAL} . 8080", masquerade=True)},
    ),
    "a balancer's address is open to who is in its ranges": (
        SETTINGS,
        RANGED,
        {"source": "192.0.2.7", "destination": "203.0.113.1", "port": 80, "interface": "eth0"},
        {Outcome("accept", f"{LOCAL} . 8080")},
    ),
    "and closed to others": (
        SETTINGS,
        RANGED,
        {"source": "192.0.3.7", "destination": "203.0.113.1", "port": 80, "interface": "eth0"},
        {Outcome("drop")},
    ),
    "to the node, too": (
        SETTINGS,
        plan(ranges=("192.0.2.0/24",)),
        {"source": "10.0.0.1", "destination": "203.0.113.1", "port": 80, "interface": ""},
        {Outcome("drop")},
    ),
    "but the NodePort behind it is open": (
        SETTINGS,
        RANGED,
        {"source": "192.0.3.7", "destination": "10.0.0.1", "port": 30001, "interface": "eth0"},
        {Outcome("accept", f"{LOCAL} . 8080")},
    ),
    "a Service whose port is a NodePort's number elsewhere is not taken for it": (
        SETTINGS,
        msgspec.structs.replace(
            plan(cluster=(REMOTE,), affinity=0),
            frontends=(
                Frontend(kind=FrontendKind.CLUSTER_IP, address=address("10.96.0.1"), port=30001),
                Frontend(kind=FrontendKind.NODE_PORT, address=None, port=30001),
            ),
        ),
        {"source": LOCAL, "destination": "10.96.0.1", "port": 30001, "interface": "pw0"},
        {Outcome("accept", f"{REMOTE} . 8080")},
    ),
}


@pytest.mark.parametrize(("settings", "made", "packet", "wanted"), TRACES.values(), ids=TRACES.keys())
@pytest.mark.parametrize("version", [4, 6])
def test_what_else_becomes_of_a_packet(
    version: int, settings: Settings, made: PortPlan, packet: dict[str, str | int], wanted: set[Outcome]
) -> None:
    if version == 6:
        made = _twin(made)
        networks = tuple(network(str(each), 6) for each in settings.node_port_addresses)
        settings = msgspec.structs.replace(settings, node_port_addresses=networks)
    got = outcomes(
        kernel(made, settings=settings),
        version,
        source=address(str(packet["source"]), version),
        destination=address(str(packet["destination"]), version),
        protocol=Protocol.TCP,
        port=packet["port"],
        interface=packet["interface"],
    )
    assert got == {msgspec.structs.replace(each, endpoint=_endpoint(each.endpoint, version)) for each in wanted}


def _endpoint(text: str, version: int) -> str:
    host, dot, port = text.partition(" . ")
    return f"{address(host, version)}{dot}{port}" if text else ""


def _twin(made: PortPlan) -> PortPlan:
    """The same plan in IPv6."""
    replace = msgspec.structs.replace
    frontends = tuple(
        replace(
            each,
            address=each.address and address(str(each.address), 6),
            source_ranges=tuple(network(str(ranges), 6) for ranges in each.source_ranges),
        )
        for each in made.frontends
    )
    cluster, local = (
        tuple(replace(each, address=address(str(each.address), 6)) for each in backends)
        for backends in (made.cluster, made.local)
    )
    return replace(made, key=replace(made.key, version=6), frontends=frontends, cluster=cluster, local=local)


def test_who_is_remembered_goes_back() -> None:
    fake = kernel(plan(affinity=600))
    fake.tables["ip podwire_proxy"].sets["affinity"]["192.0.2.7 . 10.96.0.1 . 6 . 80"] = f"{REMOTE} . 8080"
    client = {"destination": address("10.96.0.1"), "protocol": Protocol.TCP, "port": 80, "interface": "eth0"}
    assert {each.endpoint for each in outcomes(fake, 4, source=address("192.0.2.7"), **client)} == {f"{REMOTE} . 8080"}
    assert len(outcomes(fake, 4, source=address("192.0.2.8"), **client)) == 2


def test_a_rule_that_is_not_known_is_not_guessed() -> None:
    fake = kernel(plan())
    fake.run("add rule ip podwire_proxy postrouting meta mark set 7\n")
    with pytest.raises(UnknownRule, match="mark"):
        outcomes(fake, 4, source=address("10.0.0.1"), destination=address("192.0.2.7"), protocol=Protocol.UDP, port=1)


@pytest.mark.parametrize("name", ['pw0" accept', "a b", "", "*", "sixteen-letters-", "cali**"])
def test_an_interface_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(BadInterface):
        NftablesRenderer(msgspec.structs.replace(SETTINGS, pod_interfaces=(name,)))
