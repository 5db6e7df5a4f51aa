"""Services in the kernel, iptables mode: packets fare as the model says, and lose nothing while things change."""

from __future__ import annotations

import asyncio
import fcntl
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kube_proxy_lite.apply.iptables import IptablesApplier
from kube_proxy_lite.apply.iptables_fake import FakeIptables
from kube_proxy_lite.model import FrontendKind, PortPlan, Protocol, Settings, Source
from kube_proxy_lite.render.interface import ApplyFailed
from kube_proxy_lite.render.iptables import IptablesRenderer
from kube_proxy_lite.render.iptables_listing import canonical
from kube_proxy_lite.render.iptables_transactions import TABLES, Transaction
from tests.netns.node_fixtures import Netns
from tests.netns.service_stage import Stage, matrix, replace_backends
from tests.unit.iptables_stage import WHOLE, of_many_ports
from tests.unit.service_cases import LOCAL, LOCAL_2, REMOTE, REMOTE_2, SETTINGS, VARIANTS, address, plan

ONE = (FrontendKind.CLUSTER_IP,)


def lacking_legacy() -> str:
    """Why the legacy backend cannot be tried; empty when it can."""
    try:
        with Netns("legacy") as node:
            node.run("iptables-legacy-save", "-t", "nat")
            node.run("ip6tables-legacy-save", "-t", "nat")
    except (AssertionError, OSError) as error:
        return f"the kernel or iptables lacks the legacy backend: {error}"
    return ""


WHY = lacking_legacy()
needs_legacy = pytest.mark.skipif(bool(WHY), reason=WHY)
BACKENDS = ["nft", pytest.param("legacy", marks=needs_legacy)]


@pytest.fixture(scope="module", autouse=True)
def own_lock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The legacy backend's lock is the machine's, whatever the namespace: others would be waited for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XTABLES_LOCKFILE", str(tmp_path_factory.mktemp("lock") / "xtables.lock"))
        patch.setattr("kube_proxy_lite.apply.iptables.LOCK_SECONDS", 60)
        yield


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage() as built:
        yield built


class Mode:
    """The mode on a node: renderer and applier."""

    def __init__(self, node: Netns, backend: str = "nft", settings: Settings = SETTINGS, limit: int = 1500) -> None:
        self.applier = IptablesApplier(("ip", "netns", "exec", node.name), backend=backend)
        self.renderer = IptablesRenderer(settings, limit=limit)

    def start(self, *plans: PortPlan) -> tuple[Transaction, ...]:
        """Takes the node over. What that took."""
        self.renderer.update({each.key: each for each in plans}, {})
        return self.resync()

    def resync(self) -> tuple[Transaction, ...]:
        transactions = self.renderer.resync(asyncio.run(self.applier.read()))
        asyncio.run(self.applier.apply(transactions))
        return transactions

    def change(self, *plans: PortPlan, gone: tuple[PortPlan, ...] = ()) -> None:
        changes = {each.key: each for each in plans} | {each.key: None for each in gone}
        asyncio.run(self.applier.apply(self.renderer.update(changes, {})))

    def remove(self) -> None:
        asyncio.run(self.applier.remove())


@pytest.fixture(params=BACKENDS)
def mode(stage: Stage, request: pytest.FixtureRequest) -> Iterator[Mode]:
    made = Mode(stage.node, request.param)
    yield made
    made.remove()
    for backend in ("iptables-nft", "ip6tables-nft"):
        assert "KUBE-" not in stage.node.run(f"{backend}-save"), "a removal takes everything out"


@pytest.fixture
def nft(stage: Stage) -> Iterator[Mode]:
    made = Mode(stage.node)
    yield made
    made.remove()


# --- Packets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "variant"),
    [
        pytest.param("nft", "pods are told by their addresses", marks=pytest.mark.slow),
        ("nft", "pods are not told"),
        pytest.param("legacy", "pods are told by their interfaces", marks=needs_legacy),
    ],
)
def test_every_flow_of_the_matrix(stage: Stage, backend: str, variant: str) -> None:
    """The third way beside the model's answer and the tracer's, with the same plans."""
    settings = VARIANTS[variant]
    mode = Mode(stage.node, backend, settings)
    plans = matrix()
    wrong = {}
    try:
        mode.start(*(each for _, each in plans))
        for name, made in plans:
            for frontend in made.frontends:
                for source in Source:
                    if problem := stage.check(made, frontend, source, settings):
                        wrong[f"{name}: {source} to {frontend.kind}"] = problem
    finally:
        mode.remove()
    assert wrong == {}


def test_a_pod_that_meets_itself_is_masqueraded(stage: Stage, nft: Mode) -> None:
    for version in (4, 6):
        made = plan(f"v{version}", (LOCAL,), number=version, version=version, only=ONE)
        nft.change(made) if version == 6 else nft.start(made)
        seen = stage.ask(
            stage.local, "TCP", str(address(f"10.96.0.{version}", version)), 80, {str(made.cluster[0].address)}
        )
        assert seen == {f"{address(LOCAL, version)} {address('10.244.1.1', version)}"}


def test_a_balancers_address_is_open_to_its_ranges(stage: Stage, nft: Mode) -> None:
    plans = []
    for version in (4, 6):
        plans.append(plan(f"in{version}", (LOCAL,), version=version, ranges=("192.0.2.0/24", "10.0.0.0/16")))
        plans.append(plan(f"out{version}", (LOCAL,), version=version, number=2, ranges=("198.51.100.0/24",)))
    nft.start(*plans)
    for version in (4, 6):
        backend = str(address(LOCAL, version))
        for number, place, wanted in (
            (1, stage.outside, backend),
            (1, stage.node, backend),
            (1, stage.client, "drop"),
            (2, stage.outside, "drop"),
        ):
            seen = stage.ask(place, "TCP", str(address(f"203.0.113.{number}", version)), 80, {wanted})
            assert {each.partition(" ")[0] for each in seen} == {wanted}, f"v{version} {number} {place.name}"


@pytest.mark.parametrize("version", [4, 6])
def test_sctp_is_translated_like_the_others(stage: Stage, nft: Mode, version: int) -> None:
    """Crafted, since not every kernel has SCTP sockets; the checksum is the kernel's."""
    nft.start(plan("sctp", (LOCAL,), protocol=Protocol.SCTP, version=version))
    taker = stage.start(stage.local, "sctp-take", str(version))
    assert taker.stdout is not None
    assert taker.stdout.readline() == "ready\n"
    sender = stage.start(stage.client, "sctp-send", str(address("10.96.0.1", version)), "80")
    assert sender.wait(60) == 0
    taken = json.loads(taker.stdout.readline())
    assert taken == {"from": str(address("10.244.1.9", version)), "port": 8080, "valid": True}


def servers(stage: Stage, place: Netns, to: str, times: int = 20) -> set[str]:
    """Who answers connections."""
    return {stage.ask(place, "TCP", to, 80, {"all of them"}).pop().partition(" ")[0] for _ in range(times)}


def test_a_client_stays_with_its_backend_until_that_is_gone(stage: Stage, mode: Mode) -> None:
    backends = (LOCAL, LOCAL_2, REMOTE, REMOTE_2)
    for version in (4, 6):
        made = plan(f"v{version}", backends, number=1, version=version, affinity=600)
        mode.start(made) if version == 4 else mode.change(made)
        to = str(address("10.96.0.1", version))
        (first,) = servers(stage, stage.client, to)
        assert len(servers(stage, stage.node, to)) == 1, "the node is a client of its own"
        assert mode.resync() == ()
        left = tuple(each for each in backends if str(address(each, version)) != first)
        mode.change(plan(f"v{version}", left, number=1, version=version, affinity=600))
        (second,) = servers(stage, stage.client, to)
        assert second != first


def test_a_client_that_stays_away_is_forgotten(stage: Stage, nft: Mode) -> None:
    nft.start(plan(cluster=(LOCAL, LOCAL_2, REMOTE, REMOTE_2), affinity=1))
    seen: set[str] = set()
    for _ in range(30):  # once in 10^18 times the dice fall alike
        seen |= servers(stage, stage.client, "10.96.0.1", times=1)
        if len(seen) > 1:
            break
        time.sleep(1.1)
    assert len(seen) > 1


# --- What the kernel has ------------------------------------------------------------------------------------------


def kernels(stage: Stage, mode: Mode, version: int) -> dict[str, dict[str, list[str]]]:
    """What the kernel has, as the fake has it."""
    tables: dict[str, dict[str, list[str]]] = {}
    program = f"{'iptables' if version == 4 else 'ip6tables'}-{asyncio.run(mode.applier.backend())}-save"
    for table in TABLES:
        chains = tables[table] = {}
        for line in stage.node.run(program, "-t", table).splitlines():
            if line.startswith(":"):
                chains[line[1:].split()[0]] = []
            elif line.startswith("-A "):
                _, chain, rule = line.split(" ", 2)
                chains[chain].append(rule)
    return tables


def test_the_kernel_keeps_what_it_is_told_to_the_letter(stage: Stage, mode: Mode) -> None:
    """So that a restart compares texts; the fake is held to the same texts on the way."""
    many = (LOCAL, *(f"10.244.2.{host}" for host in range(100)))
    plans = [
        *WHOLE,
        plan("big", many, number=5),
        plan("six", many, number=5, version=6, affinity=5),
        of_many_ports(plan("a", number=6), 40),
        of_many_ports(plan("b", number=7, version=6, protocol=Protocol.UDP), 40),
        *(plan(f"s{n}", number=10 + n, version=4 + n % 2 * 2, protocol=list(Protocol)[n % 3]) for n in range(40)),
    ]
    fake = FakeIptables()
    fake.commit(mode.start(*plans))
    for version in (4, 6):
        assert kernels(stage, mode, version) == {table: fake.tables[version][table] for table in TABLES}
    assert Mode(stage.node, asyncio.run(mode.applier.backend())).start(*plans) == ()
    changes = [plan("big", many[:50], number=5), *plans[:2], of_many_ports(plan("a", number=6), 5)]
    gone = tuple(plans[12:30])
    sent = mode.renderer.update({each.key: each for each in changes} | {each.key: None for each in gone}, {})
    asyncio.run(mode.applier.apply(sent))
    fake.commit(sent)
    for version in (4, 6):
        assert kernels(stage, mode, version) == {table: fake.tables[version][table] for table in TABLES}


def test_many_pieces_and_one_are_the_same(stage: Stage, mode: Mode) -> None:
    small = Mode(stage.node, asyncio.run(mode.applier.backend()), limit=20)
    assert len(small.start(*WHOLE)) > 5
    assert mode.start(*WHOLE) == ()


FOREIGN = """*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A DOCKER -p tcp -m tcp --dport 8088 -j DNAT --to-destination 172.17.0.2:80
:KUBE-HOSTPORTS - [0:0]
-A KUBE-HOSTPORTS -p tcp -m tcp --dport 8089 -j RETURN
COMMIT
*filter
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A DOCKER-USER -j RETURN
COMMIT
"""


def test_rules_of_others_stay_and_drift_is_repaired() -> None:
    with Netns("drift") as node:
        node.run("iptables-nft-restore", "--noflush", stdin=FOREIGN)
        before = foreign(node)
        mode = Mode(node)
        mode.start(*WHOLE)
        assert foreign(node) == before
        node.run("iptables-nft", "-t", "nat", "-F", "KUBE-SERVICES")
        node.run("iptables-nft", "-t", "nat", "-D", "PREROUTING", "1")
        node.run("ip6tables-nft", "-t", "filter", "-F")
        assert mode.resync() != ()
        assert mode.resync() == ()
        mode.change(gone=WHOLE[:2])
        assert foreign(node) == before
        mode.remove()
        assert foreign(node) == before
        assert "KUBE-SERVICES" not in node.run("iptables-nft-save")


def foreign(node: Netns) -> list[str]:
    """The rules that are not ours, and the chains."""
    lines = node.run("iptables-nft-save").splitlines()
    known = [line for line in lines if line.startswith(("-A", ":")) and "ACCEPT" not in line]
    return [line for line in known if "KUBE-" not in line or "KUBE-HOSTPORTS" in line]


# --- Backends, locks ------------------------------------------------------------------------------------------------

HINT = "*mangle\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n"
SOME = "*filter\n-A INPUT -i lo -j ACCEPT\n-A INPUT -i lo -j ACCEPT\nCOMMIT\n"
USED = "*nat\n:KUBE-SERVICES - [0:0]\nCOMMIT\n"
FOUND = {
    "an empty node": ([], "nft"),
    "the kubelet says legacy": ([("legacy", HINT), ("nft", SOME)], "legacy"),
    "the kubelet says nft": ([("nft", HINT), ("legacy", SOME)], "nft"),
    "rules of Services are in legacy": ([("legacy", USED), ("nft", SOME)], "legacy"),
    "more rules are in legacy": ([("legacy", SOME)], "legacy"),
}


@needs_legacy
@pytest.mark.parametrize(("there", "found"), FOUND.values(), ids=FOUND.keys())
def test_the_backend_is_the_one_that_the_node_uses(there: list[tuple[str, str]], found: str) -> None:
    with Netns("backend") as node:
        for backend, text in there:
            node.run(f"iptables-{backend}-restore", "--noflush", stdin=text)
        assert asyncio.run(Mode(node, "").applier.backend()) == found


@needs_legacy
def test_a_lock_that_others_hold_is_waited_for_and_then_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kube_proxy_lite.apply.iptables.LOCK_SECONDS", 1)
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    with Netns("lock") as node, (tmp_path / "xtables.lock").open("w") as lock:
        mode = Mode(node, "legacy")
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ApplyFailed, match="lock"):
            mode.start(plan())
        fcntl.flock(lock, fcntl.LOCK_UN)
        monkeypatch.setattr("kube_proxy_lite.apply.iptables.LOCK_SECONDS", 60)  # one family waits for the other
        assert mode.resync() != ()
        assert mode.resync() == ()


def test_what_iptables_refuses_is_told_and_repaired(nft: Mode) -> None:
    nft.start(plan())
    with pytest.raises(ApplyFailed, match="KUBE-NOWHERE"):
        asyncio.run(nft.applier.apply([Transaction(version=4, nat=("-A KUBE-SERVICES -j KUBE-NOWHERE",))]))
    assert nft.resync() == ()
    with pytest.raises(ApplyFailed, match="cannot be run"):
        asyncio.run(IptablesApplier(("/nowhere",), backend="nft").read())


def test_a_rule_that_says_the_same_is_the_same() -> None:
    assert canonical('-p tcp -m comment --comment "a b" -m tcp --dport 80 -j X') == "-p tcp --dport 80 -j X"


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
        for turn in range(40):
            mode.change(replace_backends(made, choices[turn % len(choices)]))
            mode.change(*(plan(f"s{n}", number=20 + n + turn, only=ONE) for n in range(9)))
    assert counts.keys() == {LOCAL, LOCAL_2, REMOTE, REMOTE_2}, counts
    assert sum(counts.values()) > 40


def test_no_connection_is_lost_by_a_restart_or_by_what_a_kube_proxy_has_left(stage: Stage, nft: Mode) -> None:
    made = plan(cluster=(LOCAL, REMOTE), only=ONE)
    nft.start(made)
    flat = "\n".join(
        (
            "*nat\n:KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]\n:KUBE-SEP-AAAAAAAAAAAAAAAA - [0:0]\n:KUBE-SERVICES - [0:0]",
            "-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-AAAAAAAAAAAAAAAA",
            "-A KUBE-SVC-AAAAAAAAAAAAAAAA -j KUBE-SEP-AAAAAAAAAAAAAAAA",
            f"-A KUBE-SEP-AAAAAAAAAAAAAAAA -p tcp -m tcp -j DNAT --to-destination {LOCAL_2}:8080\nCOMMIT\n",
        )
    )
    with stage.load(stage.client, "10.96.0.1", 80) as counts:
        for turn in range(6):
            if turn % 2:
                stage.node.run("iptables-nft-restore", "--noflush", stdin=flat)
            fresh = Mode(stage.node)
            assert bool(fresh.start(made)) == bool(turn % 2)
    assert counts.keys() <= {LOCAL, REMOTE, LOCAL_2}, counts
    assert sum(counts.values()) > 20
