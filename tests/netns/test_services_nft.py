"""Services in the kernel, nftables mode: packets fare as the model says, and lose nothing while things change."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from kube_proxy_lite.apply.nftables import NftablesApplier
from kube_proxy_lite.model import FrontendKind, PortPlan, Protocol, Settings, Source
from kube_proxy_lite.render.nftables import NftablesRenderer
from kube_proxy_lite.render.nftables_layout import WORDS
from kube_proxy_lite.render.nftables_listing import parse_table
from tests.netns.node_fixtures import Netns, eventually
from tests.netns.service_stage import Stage, matrix, replace_backends
from tests.unit.service_cases import LOCAL, LOCAL_2, REMOTE, REMOTE_2, SETTINGS, VARIANTS, address, plan

ONE = (FrontendKind.CLUSTER_IP,)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage() as built:
        yield built


class Mode:
    """The mode on a node: renderer and applier."""

    def __init__(self, nft: tuple[str, ...], settings: Settings = SETTINGS) -> None:
        self.settings = settings
        self.applier = NftablesApplier(nft)
        self.renderer = NftablesRenderer(settings)

    def start(self, *plans: PortPlan) -> int:
        """Takes the node over. How many transactions that took."""
        self.renderer.update({each.key: each for each in plans}, {})
        return self.resync()

    def resync(self) -> int:
        transactions = self.renderer.resync(asyncio.run(self.applier.read()))
        asyncio.run(self.applier.apply(transactions))
        return len(transactions)

    def change(self, *plans: PortPlan, gone: tuple[PortPlan, ...] = ()) -> None:
        changes = {each.key: each for each in plans} | {each.key: None for each in gone}
        asyncio.run(self.applier.apply(self.renderer.update(changes, {})))

    def remove(self) -> None:
        asyncio.run(self.applier.remove())


@pytest.fixture
def mode(stage: Stage) -> Iterator[Mode]:
    made = Mode(stage.nft)
    made.remove()
    yield made
    made.remove()


# --- Packets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", [pytest.param("pods are told by their addresses", marks=pytest.mark.slow), "pods are not told"]
)
def test_every_flow_of_the_matrix(stage: Stage, variant: str) -> None:
    """The third way beside the model's answer and the tracer's, with the same plans."""
    settings = VARIANTS[variant]
    mode = Mode(stage.nft, settings)
    plans = matrix()
    mode.start(*(each for _, each in plans))
    wrong = {}
    try:
        for name, made in plans:
            for frontend in made.frontends:
                for source in Source:
                    if problem := stage.check(made, frontend, source, settings):
                        wrong[f"{name}: {source} to {frontend.kind}"] = problem
    finally:
        mode.remove()
    assert wrong == {}


def test_a_pod_that_meets_itself_is_masqueraded(stage: Stage, mode: Mode) -> None:
    for version in (4, 6):
        made = plan(f"v{version}", (LOCAL,), number=version, version=version, only=ONE)
        mode.change(made) if version == 6 else mode.start(made)
        seen = stage.ask(
            stage.local, "TCP", str(address(f"10.96.0.{version}", version)), 80, {str(made.cluster[0].address)}
        )
        assert seen == {f"{address(LOCAL, version)} {address('10.244.1.1', version)}"}


def test_a_balancers_address_is_open_to_its_ranges(stage: Stage, mode: Mode) -> None:
    plans = []
    for version in (4, 6):
        plans.append(plan(f"in{version}", (LOCAL,), version=version, ranges=("192.0.2.0/24", "10.0.0.0/16")))
        plans.append(plan(f"out{version}", (LOCAL,), version=version, number=2, ranges=("198.51.100.0/24",)))
    mode.start(*plans)
    for version in (4, 6):
        backend = str(address(LOCAL, version))
        for number, place, wanted in (
            (1, stage.outside, backend),
            (1, stage.node, backend),
            (1, stage.client, "drop"),
            (2, stage.outside, "drop"),
            (2, stage.node, "drop"),
        ):
            seen = stage.ask(place, "TCP", str(address(f"203.0.113.{number}", version)), 80, {wanted})
            assert {each.partition(" ")[0] for each in seen} == {wanted}, f"v{version} {number} {place.name}"


def test_what_no_service_has_is_refused_or_dropped(stage: Stage, mode: Mode) -> None:
    mode.start(plan(), plan(version=6))
    for version in (4, 6):
        for protocol in ("TCP", "UDP"):
            assert stage.ask(stage.client, protocol, str(address("10.96.0.1", version)), 81, {"refuse"}) == {"refuse"}
        assert stage.ask(stage.client, "TCP", str(address("10.96.0.77", version)), 80, {"drop"}) == {"drop"}


@pytest.mark.parametrize("version", [4, 6])
def test_sctp_is_translated_like_the_others(stage: Stage, mode: Mode, version: int) -> None:
    """Crafted, since not every kernel has SCTP sockets; the checksum is the kernel's."""
    mode.start(plan("sctp", (LOCAL,), protocol=Protocol.SCTP, version=version))
    taker = stage.start(stage.local, "sctp-take", str(version))
    assert taker.stdout is not None
    assert taker.stdout.readline() == "ready\n"
    sender = stage.start(stage.client, "sctp-send", str(address("10.96.0.1", version)), "80")
    assert sender.wait(60) == 0
    taken = json.loads(taker.stdout.readline())
    assert taken == {"from": str(address("10.244.1.9", version)), "port": 8080, "valid": True}


# --- Affinity -----------------------------------------------------------------------------------------------------


def servers(stage: Stage, place: Netns, to: str, times: int = 20) -> set[str]:
    """Who answers connections."""
    return {stage.ask(place, "TCP", to, 80, {"all of them"}).pop().partition(" ")[0] for _ in range(times)}


def entries(stage: Stage, version: int = 4) -> dict[str, str]:
    """Who is remembered to have gone where."""
    words = WORDS[version].table.split()
    return parse_table(stage.node.run("nft", "-p", "list", "map", *words, "affinity")).sets["affinity"]


def test_a_client_stays_with_its_backend_until_that_is_gone(stage: Stage, mode: Mode) -> None:
    backends = (LOCAL, LOCAL_2, REMOTE, REMOTE_2)
    for version in (4, 6):
        made = plan(f"v{version}", backends, number=1, version=version, affinity=600)
        mode.start(made) if version == 4 else mode.change(made)
        to = str(address("10.96.0.1", version))
        (first,) = servers(stage, stage.client, to)
        assert len(servers(stage, stage.node, to)) == 1, "the node is a client of its own"
        left = tuple(each for each in backends if str(address(each, version)) != first)
        mode.change(plan(f"v{version}", left, number=1, version=version, affinity=600))
        assert not [each for each in entries(stage, version).values() if each.startswith(f"{first} ")]
        (second,) = servers(stage, stage.client, to)
        assert second != first
        assert mode.resync() == 0


def test_a_client_that_stays_away_is_forgotten(stage: Stage, mode: Mode) -> None:
    mode.start(plan(affinity=1))

    def is_remembered() -> bool:  # if nobody took longer than that second to look
        servers(stage, stage.client, "10.96.0.1", times=1)
        return len(entries(stage)) == 1

    asyncio.run(asyncio.wait_for(eventually(is_remembered), 60))
    asyncio.run(asyncio.wait_for(eventually(lambda: not entries(stage)), 60))


def test_who_comes_by_a_node_port_is_remembered_too(stage: Stage, mode: Mode) -> None:
    backends = (LOCAL, LOCAL_2, REMOTE, REMOTE_2)
    mode.start(plan(cluster=backends, local=(LOCAL, LOCAL_2), affinity=600, external_local=True))
    seen = set()
    for _ in range(20):
        seen |= stage.ask(stage.outside, "TCP", "10.0.0.1", 30001, {"all"})
    assert len(seen) == 1
    assert list(entries(stage)) == ["192.0.2.7 . 10.0.0.1 . 6 . 30001"]
    mode.change(plan(cluster=backends, local=(LOCAL_2,), affinity=600, external_local=True))
    (only,) = stage.ask(stage.outside, "TCP", "10.0.0.1", 30001, {LOCAL_2})
    assert only == f"{LOCAL_2} 192.0.2.7"


def test_affinity_outlives_a_restart(stage: Stage, mode: Mode) -> None:
    made = plan(cluster=(LOCAL, LOCAL_2, REMOTE, REMOTE_2), affinity=600)
    mode.start(made)
    before = servers(stage, stage.client, "10.96.0.1", times=2)
    assert Mode(stage.nft).start(made) == 0
    assert servers(stage, stage.client, "10.96.0.1") == before


# --- Under load ---------------------------------------------------------------------------------------------------


def test_no_connection_is_lost_while_backends_come_and_go(stage: Stage, mode: Mode) -> None:
    made = plan(cluster=(LOCAL,), only=ONE)
    mode.start(made)
    choices = (
        (LOCAL, LOCAL_2),
        (LOCAL_2, REMOTE),
        (REMOTE,),
        (REMOTE, REMOTE_2, LOCAL),
        (REMOTE_2,),
        (LOCAL, REMOTE_2),
    )
    with stage.load(stage.client, "10.96.0.1", 80) as counts:
        for turn in range(60):
            mode.change(replace_backends(made, choices[turn % len(choices)]))
    assert counts.keys() == {LOCAL, LOCAL_2, REMOTE, REMOTE_2}, counts
    assert sum(counts.values()) > 100


def test_no_connection_is_lost_by_a_restart_or_an_upgrade(stage: Stage, mode: Mode) -> None:
    made = plan(cluster=(LOCAL, REMOTE), only=ONE)
    mode.start(made)
    with stage.load(stage.client, "10.96.0.1", 80) as counts:
        for mark in ("sets=other rules=other", None, "", None) * 3:
            if mark is not None:
                # an older version: other declarations, so that everything is replaced, or other rules
                now = asyncio.run(mode.applier.read())[4]
                assert now is not None
                other = mark or f"{now.mark.partition(' ')[0]} rules=other"
                script = (
                    f'flush chain ip podwire_proxy shape\nadd rule ip podwire_proxy shape counter comment "{other}"\n'
                )
                stage.node.run("nft", "-f", "-", stdin=script)
            again = Mode(stage.nft)
            assert (again.start(made) > 0) == (mark is not None)
    assert counts.keys() == {LOCAL, REMOTE}, counts
