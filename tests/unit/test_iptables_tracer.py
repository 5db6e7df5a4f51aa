"""What the rules of the iptables mode do with a packet is what the model says: every flow of the matrix, traced."""

from __future__ import annotations

import ipaddress
import itertools
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kube_proxy_lite.apply.iptables_fake import FakeIptables
from kube_proxy_lite.model import (
    Frontend,
    FrontendKind,
    PortPlan,
    Protocol,
    Settings,
    Source,
    Verdict,
    decide,
    is_allowed,
)
from kube_proxy_lite.render.iptables import IptablesRenderer
from kube_proxy_lite.render.iptables_chains import BadInterface, Names
from kube_proxy_lite.render.iptables_tracer import chances, trace
from kube_proxy_lite.render.iptables_tree import AddressTree
from kube_proxy_lite.render.nftables_elements import endpoint_text
from kube_proxy_lite.render.nftables_tracer import Outcome, Packet, UnknownRule
from tests.unit.iptables_stage import PLANS
from tests.unit.service_cases import (
    CLIENTS,
    INTERFACES,
    LOCAL,
    NODE,
    REMOTE,
    REMOTE_2,
    SETTINGS,
    VARIANTS,
    address,
    flows,
    network,
    plan,
)


def kernel(*plans: PortPlan, settings: Settings = SETTINGS) -> FakeIptables:
    """A node that has these plans and nothing else."""
    renderer, fake = IptablesRenderer(settings), FakeIptables()
    renderer.update({each.key: each for each in plans}, {})
    fake.commit(renderer.resync(fake.listing()))
    return fake


def packet(source: str, destination: str, port: int, version: int = 4, **rest: object) -> Packet:
    """A packet between two addresses, which are service_cases.py's or their twins."""
    words = {"protocol": Protocol.TCP, "interface": "eth0", **rest}
    return Packet(source=address(source, version), destination=address(destination, version), port=port, **words)  # type: ignore[arg-type]


def outcomes(fake: FakeIptables, version: int, asked: Packet) -> frozenset[Outcome]:
    return trace(fake.tables[version], asked, NODE[version])


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
    kernels: dict[PortPlan, FakeIptables] = {}
    for name, made, frontend, source in flows():
        made = msgspec.structs.replace(made, affinity=affinity)
        if made not in kernels:
            kernels[made] = kernel(made, settings=settings)
        version = made.key.version
        asked = Packet(
            source=address(CLIENTS[source], version),
            destination=frontend.address or address("10.0.1.1", version),
            protocol=made.key.protocol,
            port=frontend.port,
            interface=INTERFACES[source],
        )
        got = outcomes(kernels[made], version, asked)
        if got != expected(made, frontend, source, settings):
            wrong[name] = (got, expected(made, frontend, source, settings))
    assert wrong == {}


@given(plans=st.lists(PLANS, min_size=1, max_size=4), variant=st.sampled_from(list(VARIANTS)))
@hypothesis_settings(max_examples=40, deadline=None)
def test_any_services_together_fare_as_the_model_says(plans: list[PortPlan], variant: str) -> None:
    settings = VARIANTS[variant]
    together = {each.key.service: each for each in plans}  # those of one name ask for the same places
    fake = kernel(*together.values(), settings=settings)
    for made in together.values():
        version = made.key.version
        for frontend, source in itertools.product(made.frontends, Source):
            client = address(CLIENTS[source], version)
            asked = Packet(
                source=client,
                destination=frontend.address or address("10.0.1.1", version),
                protocol=made.key.protocol,
                port=frontend.port,
                interface=INTERFACES[source],
            )
            wanted = expected(made, frontend, source, settings)
            if not is_allowed(frontend, client):
                wanted = frozenset({Outcome("drop")})
            assert outcomes(fake, version, asked) == wanted, (made, frontend, source)


def with_node_ports_on(text: str) -> Settings:
    return msgspec.structs.replace(SETTINGS, node_port_addresses=(ipaddress.ip_network(text),))


RANGED = plan(ranges=("192.0.2.0/24", "10.0.0.0/16"), external_local=True)
NOBODY_LOCAL = plan(cluster=(REMOTE,), local=(), ranges=("192.0.2.0/24",), external_local=True)
NOBODY = plan(cluster=(), local=(), ranges=("192.0.2.0/24",))
GONE = {Outcome("accept")}

TRACES: dict[str, tuple[Settings, PortPlan, Packet, set[Outcome]]] = {
    "a pod that gets to itself is masqueraded": (
        SETTINGS,
        plan(cluster=(LOCAL,)),
        packet(LOCAL, "10.96.0.1", 80, interface="pw0"),
        {Outcome("accept", f"{LOCAL} . 8080", masquerade=True)},
    ),
    "a pod that gets to another is not": (
        SETTINGS,
        plan(cluster=(LOCAL, REMOTE)),
        packet(REMOTE_2, "10.96.0.1", 80, interface="pw0"),
        {Outcome("accept", f"{LOCAL} . 8080"), Outcome("accept", f"{REMOTE} . 8080")},
    ),
    "a port that a ClusterIP does not have gets nowhere": (
        SETTINGS,
        plan(),
        packet(LOCAL, "10.96.0.1", 81, interface="pw0"),
        {Outcome("drop")},
    ),
    "a ClusterIP that nobody has is dropped": (
        SETTINGS,
        plan(),
        packet(LOCAL, "10.96.0.2", 80, interface="pw0"),
        {Outcome("drop")},
    ),
    "and left to others when the service CIDRs are not known": (
        msgspec.structs.replace(SETTINGS, service_cidrs=()),
        plan(),
        packet(LOCAL, "10.96.0.2", 80, interface="pw0"),
        GONE,
    ),
    "other traffic passes": (SETTINGS, plan(), packet(LOCAL, "192.0.2.7", 80, interface="pw0"), GONE),
    "a node's port that is nobody's passes": (SETTINGS, plan(), packet("192.0.2.7", "10.0.0.1", 22), GONE),
    "a NodePort's number on another machine passes": (SETTINGS, plan(), packet(LOCAL, "10.0.0.2", 30001), GONE),
    "a NodePort does not answer on loopback": (
        SETTINGS,
        plan(),
        packet("127.0.0.1", "127.0.0.1", 30001, interface=""),
        GONE,
    ),
    "nor where loopback is within the addresses for NodePorts": (
        with_node_ports_on("64.0.0.0/2"),
        plan(),
        packet("127.0.0.1", "127.0.0.1", 30001, interface=""),
        GONE,
    ),
    "a NodePort on an address that is not for NodePorts passes": (
        with_node_ports_on("10.0.0.0/24"),
        plan(),
        packet("192.0.2.7", "10.0.1.1", 30001),
        GONE,
    ),
    "a NodePort on an address that is": (
        with_node_ports_on("10.0.0.0/24"),
        plan(cluster=(LOCAL,)),
        packet("192.0.2.7", "10.0.0.1", 30001),
        {Outcome("accept", f"{LOCAL} . 8080", masquerade=True)},
    ),
    "a balancer's address is open to who is in its ranges": (
        SETTINGS,
        RANGED,
        packet("192.0.2.7", "203.0.113.1", 80),
        {Outcome("accept", f"{LOCAL} . 8080")},
    ),
    "and closed to others": (SETTINGS, RANGED, packet("192.0.3.7", "203.0.113.1", 80), {Outcome("drop")}),
    "to the node, too": (
        SETTINGS,
        plan(ranges=("192.0.2.0/24",)),
        packet("10.0.0.1", "203.0.113.1", 80, interface=""),
        {Outcome("drop")},
    ),
    "but the NodePort behind it is open": (
        SETTINGS,
        RANGED,
        packet("192.0.3.7", "10.0.0.1", 30001),
        {Outcome("accept", f"{LOCAL} . 8080")},
    ),
    "who may come in meets nobody here": (
        SETTINGS,
        NOBODY_LOCAL,
        packet("192.0.2.7", "203.0.113.1", 80),
        {Outcome("drop")},
    ),
    "who may come in is refused where there is no endpoint": (
        SETTINGS,
        NOBODY,
        packet("192.0.2.7", "203.0.113.1", 80),
        {Outcome("refuse")},
    ),
    "who may not is dropped": (SETTINGS, NOBODY, packet("192.0.3.7", "203.0.113.1", 80), {Outcome("drop")}),
    "a Service whose port is a NodePort's number elsewhere is not taken for it": (
        SETTINGS,
        msgspec.structs.replace(
            plan(cluster=(REMOTE,)),
            frontends=(
                Frontend(kind=FrontendKind.CLUSTER_IP, address=address("10.96.0.1"), port=30001),
                Frontend(kind=FrontendKind.NODE_PORT, address=None, port=30001),
            ),
        ),
        packet(LOCAL, "10.96.0.1", 30001, interface="pw0"),
        {Outcome("accept", f"{REMOTE} . 8080")},
    ),
}


@pytest.mark.parametrize(("settings", "made", "asked", "wanted"), TRACES.values(), ids=TRACES.keys())
def test_what_else_becomes_of_a_packet(settings: Settings, made: PortPlan, asked: Packet, wanted: set[Outcome]) -> None:
    node = NODE[4] | {address("127.0.0.1")}
    assert trace(kernel(made, settings=settings).tables[4], asked, node) == wanted


def test_balancers_addresses_with_ranges_of_their_own_are_told_apart() -> None:
    """As they are where the node has one of them, and so may ask it from itself."""
    first, second = (
        Frontend(kind=FrontendKind.LOAD_BALANCER, address=address(at), port=80, source_ranges=(network(ranges),))
        for at, ranges in (("203.0.113.1", "192.0.2.0/24"), ("203.0.113.2", "198.51.0.0/16"))
    )
    fake = kernel(msgspec.structs.replace(plan(cluster=(LOCAL,)), frontends=(first, second)))
    seen = {
        (source, at): {each.verdict for each in outcomes(fake, 4, packet(source, at, 80))}
        for source in ("192.0.2.7", "198.51.7.7")
        for at in ("203.0.113.1", "203.0.113.2")
    }
    allowed = [each for each, verdicts in seen.items() if verdicts == {"accept"}]
    assert allowed == [("192.0.2.7", "203.0.113.1"), ("198.51.7.7", "203.0.113.2")]
    assert {"drop"} in seen.values()


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("count", [1, 2, 16, 17, 100, 1000])
def test_every_endpoint_is_as_likely_as_the_others(count: int, version: int) -> None:
    """However the dice are divided; with affinity, too."""
    for affinity in (0, 60):
        hosts = tuple(f"10.244.{2 + number // 200}.{number % 200}" for number in range(count))
        fake = kernel(plan(cluster=hosts, affinity=affinity, version=version))
        found = chances(fake.tables[version], packet(LOCAL, "10.96.0.1", 80, version, interface="pw0"), NODE[version])
        assert len(found) == count
        assert all(abs(chance * count - 1) < 1e-4 for chance in found.values())


def test_no_packet_walks_a_list_as_long_as_the_cluster() -> None:
    """Neither of Services nor of node ports nor of endpoints; what is for nobody leaves at the roots."""
    plans = [plan(f"s{n}", (LOCAL, REMOTE), number=n % 250, only=()) for n in range(3000)]
    plans = [
        msgspec.structs.replace(
            each,
            frontends=(
                Frontend(kind=FrontendKind.CLUSTER_IP, address=address("10.96.0.0") + n * 21, port=80),
                Frontend(kind=FrontendKind.NODE_PORT, address=None, port=30000 + n),
            ),
        )
        for n, each in enumerate(plans)
    ]
    plans.append(plan("big", tuple(f"10.244.{2 + n // 200}.{n % 200}" for n in range(1000)), only=(), number=0))
    fake = kernel(*plans)
    longest = max(len(rules) for rules in fake.tables[4]["nat"].values())
    assert longest <= 17
    assert len(fake.tables[4]["nat"]["KUBE-SERVICES"]) == 2


def test_a_change_looks_at_its_own_paths_through_the_trees() -> None:
    tree = AddressTree("test", 4)
    for number in range(5000):
        tree.set(int(address("10.96.0.0")) + number * 37, Protocol.TCP, 80, ("a comment", "-j RETURN"))
    assert len(tree.chains()) > 600
    for number in (0, 2500, 4999):
        assert len(tree.chains({int(address("10.96.0.0")) + number * 37})) < 50
    assert len(tree.chains(set())) == 1


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("seed", range(8))
def test_a_tree_that_changes_is_as_from_scratch(seed: int, version: int) -> None:
    """What is told of a change is enough, whatever divides and joins: addresses far from each other and near, with one
    port and with many."""
    dice, tree = random.Random(seed), AddressTree("test", version)
    there: set[int] = set()
    chains: dict[str, object] = {}
    near = int(address("10.96.0.0", version))
    places = sorted(
        {near + dice.randrange(1 << dice.choice((4, 8, 12, 20, 31))) for _ in range(dice.choice((40, 300)))}
    )
    for _ in range(40):
        changed = set(dice.sample(places, dice.choice((1, 1, 2, 30))))
        before = tree.chains(changed)
        for key in changed:
            for port in (80,) if key % 3 else range(12):
                tree.set(key, Protocol.TCP, port, None if key in there else ("a comment", "-j RETURN"))
        there ^= changed
        after = tree.chains(changed)
        for name, rules in after.items():
            if isinstance(rules, tuple) or name not in before:
                chains[name] = rules if isinstance(rules, tuple) else rules()
        for name in before.keys() - after.keys():
            del chains[name]
        assert chains == tree.chains()


def test_who_is_remembered_goes_back() -> None:
    made = plan(affinity=600)
    fake = kernel(made)
    mine = next(each for each in made.cluster if str(each.address) == REMOTE)
    asked = packet("192.0.2.7", "10.96.0.1", 80)
    (only,) = trace(fake.tables[4], asked, NODE[4], {Names(made).endpoint(mine)})
    assert (only.endpoint, only.learned) == (f"{REMOTE} . 8080", 600)
    assert len(outcomes(fake, 4, asked)) == 2


@pytest.mark.parametrize("rule", ["-m owner --uid-owner 0 -j RETURN", "-j TEE --gateway 10.0.0.9", "-j KUBE-SVC-NONE"])
def test_a_rule_that_is_not_known_is_not_guessed(rule: str) -> None:
    fake = kernel(plan())
    fake.tables[4]["nat"]["KUBE-SERVICES"].insert(0, rule)
    with pytest.raises(UnknownRule):
        outcomes(fake, 4, packet("10.0.0.1", "192.0.2.7", 80))


@pytest.mark.parametrize("name", ['pw0" accept', "a b", "", "*", "sixteen-letters-", "cali**", "cali+"])
def test_an_interface_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(BadInterface):
        IptablesRenderer(msgspec.structs.replace(SETTINGS, pod_interfaces=(name,)))
