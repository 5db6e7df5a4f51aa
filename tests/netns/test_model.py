"""Everything at random against a simple model: hypothesis plays the runtime, the operator and the accidents.

The model is what a runtime believes: which container has which address, and which calls it got no answer for. The
engine is the daemon's own (journal, allocator, wires, blocks, reconciler) on a node's namespace; etcd is the registry's
fake, since a real one is asked nothing else and answers later. A kill is an exception that nothing catches, raised at a
point of ipam_daemon/faults.py: what ran is gone, the file and the kernel are as they were, and another engine starts
on them. tests/netns/test_fault_points.py does the same to real processes, one by one.

After every step: what the runtime believes is so, nobody has another's address, journal and allocator agree. In the
end, when the runtime has deleted everything, nothing is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from ipam_daemon import faults
from ipam_daemon.agent import Agent
from ipam_daemon.blocks import BlockKeeper
from ipam_daemon.claims import PoolExhausted
from ipam_daemon.cni import NetworkConfig, ValidAttachment
from ipam_daemon.devices import Devices
from ipam_daemon.errors import CniError, DeletedMeanwhile, Exhausted, InterfaceExists, TryAgainLater
from ipam_daemon.faults import point
from ipam_daemon.held import HeldFile, HeldKeeper
from ipam_daemon.identity import boottime_ns
from ipam_daemon.model import AttachmentState, Block, ClusterConfig, Pool
from ipam_daemon.registry_fake import FakeRegistry, FakeStore
from ipam_daemon.settings import Settings
from podwire.errors import TryAgain
from podwire.etcd.options import EtcdOptions
from tests.netns.node_fixtures import COOLDOWN, Engine, Netns, Node, bridge_plan, call, pods

POOL = Pool(cidr=ipaddress.ip_network("10.244.1.0/27"), block_size=29)
"""Four blocks of four pods; another node has one of them."""
CONTAINERS = tuple(f"c{number}" for number in range(10))


def points(*prefixes: str) -> tuple[str, ...]:
    """The names that begin so."""
    return tuple(name for name in faults.POINTS if name.startswith(prefixes))


KILLED_IN_ADD = (*points("add.", "undo.", "block."), "journal.intending", "journal.setting-blocks")
KILLED_IN_DEL = (*points("del."), "journal.releasing")
KILLED_IN_REAP = (*points("reap."), "journal.cooling")
KILLED_IN_SUPPLY = (*points("block."), "journal.setting-blocks")
T = TypeVar("T")
container = st.sampled_from(CONTAINERS)


class Killed(BaseException):
    """The daemon is no more."""


@contextlib.contextmanager
def killing(name: str) -> Iterator[None]:
    """The engine dies at this point."""

    def trap(reached: str) -> None:
        if reached == name:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "_trap", trap)
        yield


class NodeUnderTest(RuleBasedStateMachine):
    """One node, one runtime, all accidents. `place` is the namespaces, which are made once for all runs."""

    place: ClassVar[tuple[Node, Sequence[Netns]]]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp(prefix="podwire-model-"))
        self.node, namespaces = self.place
        self.netns = dict(zip(CONTAINERS, namespaces, strict=True))
        self.store = FakeStore()
        other = ipaddress.ip_network("10.244.1.16/29")
        self.store.blocks[other] = Block(cidr=other, pool="default", node="node-2", node_id="id-2", generation=1)
        self.believed: dict[str, str] = {}  # container → address, of ADDs that were answered
        self.unknown: set[str] = set()  # containers of calls that were not
        self.vanished: set[str] = set()
        self.engine = Engine(self.node, self.folder, POOL.cidr)
        self.start()

    def play(self, story: Awaitable[T]) -> T:
        async def limited() -> T:
            return await asyncio.wait_for(story, 300)

        return self.runner.run(limited())

    def start(self) -> None:
        """What main.py and the agent do at a start, up to the first call."""
        it = self.engine
        held = HeldKeeper(
            HeldFile(self.folder / "held.json"), it.journal, it.attachments, COOLDOWN, clock=lambda: self.engine.now
        )
        registry = FakeRegistry(self.store)

        async def claim(pool: Pool) -> Block:
            block = await registry.claim_block(pool, "node-1", "id-1", 1)
            point("block.claimed")
            return block

        async def use(blocks: Sequence[Block]) -> None:
            it.journal.set_blocks(blocks)
            for name in ("block.journaled", "block.published", "block.plumbed"):
                self.store.check()
                point(name)
            it.attachments.addresses.use_blocks(blocks)

        self.keeper = BlockKeeper(
            registry=registry,
            attachments=it.attachments,
            claim=claim,
            use=use,
            limit=4,
            idle_s=0,
            keep=held.keep,
            clock=lambda: self.engine.now,
        )
        self.held = held
        agent = Agent(
            settings=Settings(node="node-1", etcd=EtcdOptions(endpoints=("http://127.0.0.1:1",)), pools=(POOL,)),
            node_id="id-1",
            registry=registry,
            journal=it.journal,
            attachments=it.attachments,
            thread=it.node.thread,
            wires=it.wires,
            metrics=it.metrics,
        )
        it.attachments.more = self.keeper.more

        async def go() -> None:
            held.recall()
            await agent.restore()
            if not self.store.away:
                blocks = list(await registry.load_blocks("node-1")) or [await claim(POOL)]
                it.journal.set_blocks(blocks)
                it.attachments.addresses.use_blocks(blocks)
                self.keeper.begin(ClusterConfig(pools=(POOL,)), blocks)
            it.attachments.mtu = 1450

        self.play(self.bridge())
        self.play(go())

    async def bridge(self) -> None:
        cidr = ipaddress.ip_network("10.244.1.0/29")
        await self.node.thread.run(Devices(self.node.thread).ensure_bridge, bridge_plan(cidr))

    def restart(self, *, without_journal: bool = False) -> None:
        """Another daemon takes over."""
        now = self.engine.now
        self.engine.journal.close()
        if without_journal:
            for each in self.folder.glob("journal.db*"):
                each.unlink()
        self.engine = Engine(self.node, self.folder, POOL.cidr)
        self.engine.now = now
        self.start()

    def survives(self, name: str, story: Callable[[], Awaitable[T]]) -> T | None:
        """What the story gives, or None when the daemon died at the point meanwhile; then there is another."""
        try:
            with killing(name):
                return self.play(story())
        except Killed:
            self.restart()
            return None

    # --- the runtime

    @rule(name=container)
    def add(self, name: str) -> None:
        self.added(name, self.play(self.try_add(name)))

    @rule(name=container, at=st.sampled_from(KILLED_IN_ADD))
    def add_and_die(self, name: str, at: str) -> None:
        outcome = self.survives(at, lambda: self.try_add(name))
        if outcome is None and name not in self.believed:
            self.unknown.add(name)
        elif outcome is not None:
            self.added(name, outcome)

    @precondition(lambda self: len(self.believed) < len(CONTAINERS))
    @rule(data=st.data(), at=st.sampled_from(("", *points("undo."))))
    def add_where_something_is_in_the_way(self, data: st.DataObject, at: str) -> None:
        """The container has an interface of that name already: nothing is made, whether or not the daemon dies."""
        name = data.draw(st.sampled_from([each for each in CONTAINERS if each not in self.believed]))
        self.play(self.engine.delete(name))
        self.deleted(name)
        self.play(self.engine.reap())
        self.netns[name].ip("link", "add", "eth0", "type", "bridge")
        try:
            outcome = self.survives(at, lambda: self.try_add(name))
        finally:
            self.netns[name].ip("link", "delete", "eth0")
        assert outcome is None or isinstance(outcome, InterfaceExists | TryAgainLater | Exhausted), repr(outcome)
        self.play(self.engine.delete(name))

    async def try_add(self, name: str) -> dict[str, Any] | CniError:
        try:
            return await self.engine.add(name, self.netns[name].path)
        except CniError as error:
            return error

    def added(self, name: str, outcome: dict[str, Any] | CniError) -> None:
        if not isinstance(outcome, CniError):
            assert name not in self.believed, f"{name} was added twice"
            address = outcome["ips"][0]["address"].split("/")[0]
            assert address not in self.believed.values(), f"{address} was given twice"
            self.believed[name] = address
            self.unknown.discard(name)
        elif isinstance(outcome, InterfaceExists):
            assert name in self.believed or name in self.unknown, f"{name}: {outcome}"
        elif isinstance(outcome, Exhausted):
            assert not self.available(), f"{outcome}, and yet an address was free"
            assert len(self.store.blocks) == 4, f"{outcome}, and yet a block was free"
        else:
            assert isinstance(outcome, TryAgainLater), repr(outcome)
            assert not self.available(), f"{outcome}, and yet an address was free"
            assert not self.keeper._joined.is_set() or self.store.away, str(outcome)

    def available(self) -> int:
        return sum(use.free + use.cooling for use in self.engine.attachments.addresses.allocator.use(self.engine.now))

    @rule(name=container)
    def delete(self, name: str) -> None:
        self.play(self.engine.delete(name))
        self.deleted(name)

    @rule(name=container, at=st.sampled_from(KILLED_IN_DEL))
    def delete_and_die(self, name: str, at: str) -> None:
        """The runtime got no answer, and so deletes again, or the executable's queue does."""
        self.survives(at, lambda: self.engine.delete(name))
        self.play(self.engine.delete(name))
        self.deleted(name)

    def deleted(self, name: str) -> None:
        self.believed.pop(name, None)
        self.unknown.discard(name)
        self.vanished.discard(name)

    @rule(name=container)
    def add_that_was_deleted_meanwhile(self, name: str) -> None:
        async def story() -> None:
            moment = boottime_ns()
            await self.engine.delete(name)
            with pytest.raises((DeletedMeanwhile, TryAgainLater)):
                await self.engine.add(name, self.netns[name].path, issued_ns=moment - 1)

        self.play(story())
        self.deleted(name)

    @rule(first=container, second=container, third=container)
    def at_once(self, first: str, second: str, third: str) -> None:
        """An ADD and a DEL of one container, and an ADD of others, at the same time; then the runtime deletes."""

        async def story() -> None:
            jobs = [self.try_add(first), self.engine.delete(first), self.try_add(second), self.try_add(third)]
            await asyncio.gather(*jobs)
            for name in {first, second, third}:
                await self.engine.delete(name)

        self.play(story())
        for name in (first, second, third):
            self.deleted(name)

    @rule(keep=st.sets(container))
    def collect_garbage(self, keep: set[str]) -> None:
        valid = tuple(ValidAttachment(container_id=name, ifname="eth0") for name in sorted(keep))
        config = NetworkConfig(name="podnet", cni_version="1.1.0", valid_attachments=valid)
        self.play(self.engine.attachments.collect_garbage(call("GC", "", config=config)))
        for name in set(CONTAINERS) - keep:
            self.deleted(name)

    # --- the operator, and accidents

    @rule()
    def kill(self) -> None:
        self.restart()

    @rule()
    def lose_journal(self) -> None:
        """Its file is removed while no daemon runs. Of pods that have vanished nothing is left that says so."""
        for name in set(self.vanished):
            self.deleted(name)
        self.restart(without_journal=True)

    @rule()
    def reboot(self) -> None:
        """The pods die, the journal goes with /run, the disk stays."""
        self.play(self.held.write())
        before = self.engine.attachments.addresses.allocator.not_free()
        for link in self.node.links() - {"pw0"}:
            self.node.ip("link", "delete", link)
        for each in CONTAINERS:
            self.deleted(each)
        self.restart(without_journal=True)
        if not self.store.away:
            mine = [address for address in before if any(address in b.cidr for b in self.blocks())]
            cooling = sum(use.cooling for use in self.engine.attachments.addresses.allocator.use(self.engine.now))
            assert cooling == len(mine), "what was held before the reboot cools"

    def blocks(self) -> tuple[Block, ...]:
        return self.engine.attachments.addresses.allocator.blocks

    @rule(name=container)
    def vanish(self, name: str) -> None:
        """A pod's namespace goes, and nobody says so."""
        if name in self.believed and name not in self.vanished:
            self.netns[name].ip("link", "delete", "eth0")
            self.vanished.add(name)

    @rule()
    def reconcile(self) -> None:
        async def twice() -> None:
            await self.engine.reconciler.round()
            await self.engine.reconciler.round()

        self.play(twice())
        for name in set(self.vanished):
            self.deleted(name)

    @rule()
    def reap(self) -> None:
        self.play(self.engine.reap())

    @rule(at=st.sampled_from(KILLED_IN_REAP))
    def reap_and_die(self, at: str) -> None:
        self.survives(at, self.engine.reap)
        self.play(self.engine.reap())

    @rule(seconds=st.sampled_from((1.0, 40.0)))
    def wait(self, seconds: float) -> None:
        self.engine.now += seconds

    @rule()
    def etcd_goes(self) -> None:
        self.store.away = True

    @precondition(lambda self: self.store.away)
    @rule()
    def etcd_comes_back(self) -> None:
        self.store.away = False
        self.restart()  # a daemon that started without it joins, which is the agent's part

    @rule()
    def supply(self) -> None:
        self.play(self.supplied())

    @rule(at=st.sampled_from(KILLED_IN_SUPPLY))
    def supply_and_die(self, at: str) -> None:
        self.survives(at, self.supplied)

    async def supplied(self) -> None:
        if self.keeper._joined.is_set():
            with contextlib.suppress(TryAgain, PoolExhausted):
                await self.keeper._claim_for_add()

    # --- what holds

    @invariant()
    def what_the_runtime_believes_is_so(self) -> None:
        rows = {each.key.container_id: each for each in self.engine.journal.attachments()}
        for name, address in self.believed.items():
            assert name in rows, f"{name} has {address}, and the journal does not know"
            assert [str(each.ip) for each in rows[name].addresses] == [address]
        assert [each.state for each in rows.values() if each.state is AttachmentState.ADDING] == [], "nobody adds it"
        assert set(rows) <= set(self.believed) | self.unknown, "the journal has what nobody asked for"

    @invariant()
    def journal_and_allocator_agree(self) -> None:
        journal, allocator = self.engine.journal, self.engine.attachments.addresses.allocator
        rows = [a.ip for each in (*journal.attachments(), *journal.releasing()) for a in each.addresses]  # type: ignore[attr-defined]
        assert len(rows) == len(set(rows)), "an address is held twice"
        known = [address for address in rows if any(address in block.cidr for block in allocator.blocks)]
        uses = allocator.use(self.engine.now)
        assert sum(use.used + use.releasing for use in uses) == len(known)

    @invariant()
    def blocks_are_ours(self) -> None:
        for block in self.blocks():
            assert self.store.blocks[block.cidr].node == "node-1", f"{block.cidr} is used and not ours"

    def teardown(self) -> None:
        try:
            self.check_the_kernel()
            self.everything_deleted()
        finally:
            self.engine.journal.close()
            self.runner.close()
            for link in self.node.links() - {"pw0"}:
                self.node.ip("link", "delete", link)
            shutil.rmtree(self.folder)

    def check_the_kernel(self) -> None:
        for name, address in self.believed.items():
            if name not in self.vanished:
                (found,) = self.netns[name].json("-4", "address", "show", "dev", "eth0")
                assert found["addr_info"][0]["local"] == address

    def everything_deleted(self) -> None:
        for name in CONTAINERS:
            self.play(self.engine.delete(name))
        self.play(self.engine.reap())
        uses = self.engine.attachments.addresses.allocator.use(self.engine.now)
        assert sum(use.used + use.releasing for use in uses) == 0
        assert self.node.links() == {"pw0"}
        assert not self.engine.journal.attachments()
        assert not self.engine.journal.releasing()


@pytest.fixture(scope="module")
def place() -> Iterator[None]:
    """A node and the containers' namespaces, for all runs."""
    runner = asyncio.Runner()
    node = Node("model")
    runner.run(node.__aenter__())
    try:
        with pods(len(CONTAINERS)) as namespaces:
            NodeUnderTest.place = (node, namespaces)
            yield
    finally:
        runner.run(node.__aexit__())
        runner.close()


COMMON = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
)
PROMISES = ("what the runtime believes is so", "no address twice", "nothing is held after the runtime's DEL")


@pytest.mark.fault("ADD, DEL, GC, kills, restarts, reboots, outages of etcd, in 600 random steps", promises=PROMISES)
@pytest.mark.usefixtures("place")
def test_some_steps_against_the_model() -> None:
    few = settings(COMMON, max_examples=12, stateful_step_count=50, derandomize=True, database=None)
    run_state_machine_as_test(NodeUnderTest, settings=few)


@pytest.mark.slow
@pytest.mark.fault("the same in 10,000 random steps, others each time", promises=PROMISES)
@pytest.mark.usefixtures("place")
def test_thousands_of_steps_against_the_model() -> None:
    many = settings(COMMON, max_examples=125, stateful_step_count=80, database=None, print_blob=True)
    run_state_machine_as_test(NodeUnderTest, settings=many)
