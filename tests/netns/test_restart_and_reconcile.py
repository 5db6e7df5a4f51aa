"""What a killed daemon leaves, the next one takes up; what somebody took apart is mended, what vanished is freed."""

from __future__ import annotations

import asyncio
import ipaddress
from pathlib import Path

import msgspec
import pytest

from ipam_daemon.agent import Agent
from ipam_daemon.errors import (
    Exhausted,
    InterfaceExists,
)
from ipam_daemon.etcd_registry import EtcdRegistry
from ipam_daemon.model import PodRef, Pool
from ipam_daemon.plan import gateways, plan_attachment
from ipam_daemon.settings import Settings
from podwire.etcd.options import EtcdOptions
from podwire.etcd.session import EtcdSession
from tests.netns.node_fixtures import (
    IDLE_28,
    Engine,
    Node,
    block,
    call,
    engine,
    eventually,
    hold,
    key,
    play,
    pods,
    settle,
)

# --- a daemon that was killed -------------------------------------------------------------------------------------


def test_another_daemon_on_the_same_journal_goes_on(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(3) as (a, b, c):
                await it.add("a", a.path)
                await it.add("b", b.path)
                await it.delete("b")
                again = await it.restarted().start()
                assert again.counts() == {**IDLE_28, "used": 1, "releasing": 1, "free": 10}
                assert (await again.add("c", c.path))["ips"][0]["address"] == "10.244.1.5/28"
                with pytest.raises(InterfaceExists):
                    await again.add("a", a.path)
                await again.delete("a")
                await again.reap()
                assert again.counts() == {**IDLE_28, "used": 1, "cooling": 2, "free": 9}
                again.journal.close()

    play(story)


def test_an_intent_without_a_commit_is_undone(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                addresses = it.attachments.addresses.allocator.allocate(it.now)
                intent = plan_attachment(call("ADD", "a", a.path), addresses, 1450, it.now)
                it.journal.intend(intent)
                await it.node.thread.run(it.wires.attach, intent, gateways([block(it.cidr)]))
                again = it.restarted()
                await again.start()
                assert again.journal.attachments() == ()
                assert not again.node.pings("10.244.1.3", 1)
                await again.reap()
                assert a.links() == set()
                assert again.counts()["cooling"] == 1
                assert (await again.add("a", a.path))["ips"][0]["address"] == "10.244.1.4/28"
                again.journal.close()

    play(story)


def test_a_wire_that_was_released_but_not_killed_is_dead_after_the_restart(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                await it.add("a", a.path)
                attachment = it.journal.get(key("a"))
                assert attachment is not None
                it.journal.release(attachment)
                again = await it.restarted().start()
                assert not again.node.pings("10.244.1.3", 1)
                await again.reap()
                assert again.node.links() == {"pw0"}
                again.journal.close()

    play(story)


def test_an_address_reused_before_its_time_is_not_cooling_after_a_restart(tmp_path: Path) -> None:
    """Its row among the cooling is old; while its next wire is being deleted it must not be handed out."""

    async def story() -> None:
        async with engine(tmp_path, "10.244.1.0/29") as it:
            with pods(5) as namespaces:
                for number, pod in enumerate(namespaces[:4]):
                    await it.add(f"c{number}", pod.path)
                await it.delete("c0")
                await it.reap()
                assert (await it.add("d", namespaces[0].path))["ips"][0]["address"] == "10.244.1.3/29"
                await it.delete("d")
                again = await it.restarted().start()
                assert again.counts() == {"used": 3, "releasing": 1, "cooling": 0, "reserved": 4, "free": 0}
                with pytest.raises(Exhausted):
                    await again.add("e", namespaces[4].path)
                again.journal.close()

    play(story)


def test_a_lost_journal_is_rebuilt_from_the_wires(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(3) as (a, b, c):
                await it.add("a", a.path)
                await it.add("b", b.path)
                await it.delete("b")
                before = it.journal.get(key("a"))
                it.journal.close()
                (tmp_path / "journal.db").write_bytes(b"not a database" * 1000)
                again = Engine(it.node, tmp_path, it.cidr)
                assert again.journal.set_aside is not None
                await agent_of(again).restore()
                assert len(again.node.links()) == 2, "what was killed is gone before its address is given again"
                await again.start()
                after = again.journal.get(key("a"))
                assert before is not None
                assert after is not None
                assert after == msgspec.structs.replace(before, netns="", pod=PodRef(), created=after.created)
                added = (await again.add("c", c.path))["ips"][0]["address"]
                assert added != "10.244.1.3/28"
                await again.delete("a")
                await again.reap()
                assert len(again.node.links()) == 2
                again.journal.close()

    play(story)


def agent_of(it: Engine) -> Agent:
    """The daemon's agent over an engine, for what it does before etcd is asked anything."""
    pool = Pool(cidr=ipaddress.ip_network("10.244.0.0/16"))
    settings = Settings(node="node-1", etcd=EtcdOptions(endpoints=("http://127.0.0.1:1",)), pools=(pool,))
    registry = EtcdRegistry(EtcdSession(settings.etcd))
    return Agent(
        settings=settings,
        node_id="id-1",
        registry=registry,
        journal=it.journal,
        attachments=it.attachments,
        thread=it.node.thread,
        wires=it.wires,
        metrics=it.metrics,
    )


# --- reconcile ----------------------------------------------------------------------------------------------------


@pytest.mark.fault(
    "a pod's namespace vanishes, no DEL comes", promises=("its address is freed after two observations",)
)
def test_a_vanished_pod_is_freed_after_two_rounds(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(2) as (a, b):
                await it.add("a", a.path)
                await it.add("b", b.path)
                a.delete()
                await eventually(lambda: len(it.node.links()) == 2)
                await it.reconciler.round()
                assert it.counts()["used"] == 2, "one observation is not enough"
                await it.reconciler.round()
                assert [each.key for each in it.journal.attachments()] == [key("b")]
                await it.reap()
                assert it.counts() == {**IDLE_28, "used": 1, "cooling": 1, "free": 10}

    play(story)


def test_a_vanished_pod_that_is_added_again_between_two_rounds_is_kept(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(2) as (old, new):
                await it.add("a", old.path)
                old.delete()
                await eventually(lambda: len(it.node.links()) == 1)
                await it.reconciler.round()
                await it.delete("a")
                await it.add("a", new.path)
                await it.reconciler.round()
                assert new.pings("10.244.1.1")

    play(story)


@pytest.mark.parametrize("damage", [("nomaster",), ("down",)], ids=["out of the bridge", "down"])
@pytest.mark.fault("a pod's port taken out of the bridge, or down", promises=("it is mended",))
def test_a_port_that_somebody_took_apart_is_mended(tmp_path: Path, damage: tuple[str, ...]) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                host = (await it.add("a", a.path))["interfaces"][0]["name"]
                it.node.ip("link", "set", host, *damage)
                assert not a.pings("10.244.1.1", 1)
                await it.reconciler.round()
                await it.reconciler.round()
                await eventually(lambda: a.pings("10.244.1.1", 1))
                (port,) = it.node.json("link", "show", "dev", host)
                assert port["linkinfo"]["info_slave_data"]["hairpin"] is True
                assert it.metrics.registry.get_sample_value("podwire_repairs_total", {"what": "port"}) == 1

    play(story)


def test_a_port_of_a_version_before_is_given_what_ports_have_now(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                host = (await it.add("a", a.path))["interfaces"][0]["name"]
                it.node.ip("link", "set", host, "type", "bridge_slave", "group_fwd_mask", "0", "hairpin", "off")
                await it.reconciler.round()
                await it.reconciler.round()
                (port,) = it.node.json("link", "show", "dev", host)
                data = port["linkinfo"]["info_slave_data"]
                assert (data["hairpin"], int(data["group_fwd_mask"], 16)) == (True, 0xFFFD)

    play(story)


def test_a_port_that_cannot_be_mended_does_not_keep_the_others_from_it(tmp_path: Path) -> None:
    """A macvlan device on it keeps the port out of any bridge (EBUSY)."""

    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(3) as (a, b, c):
                host = (await it.add("a", a.path))["interfaces"][0]["name"]
                await it.add("b", b.path)
                other = (await it.add("c", c.path))["interfaces"][0]["name"]
                it.node.ip("link", "set", host, "nomaster")
                it.node.ip("link", "add", "foreign0", "link", host, "type", "macvlan")
                it.node.ip("link", "set", other, "nomaster")
                b.delete()
                await eventually(lambda: len(it.node.links()) == 4)
                await it.reconciler.round()
                await it.reconciler.round()
                await eventually(lambda: c.pings("10.244.1.1", 1))
                assert it.journal.get(key("b")) is None
                assert it.journal.get(key("a")) is not None
                assert it.metrics.registry.get_sample_value("podwire_repairs_total", {"what": "failed"}) == 2

    play(story)


def test_a_round_never_revives_a_wire_that_was_deleted_meanwhile(tmp_path: Path) -> None:
    """The round looked at the journal before the DEL, and comes to the wire after it."""

    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(2) as (a, b):
                await it.add("a", a.path)
                await it.add("b", b.path)
                goes_on = await hold(it.node)
                reconciling = asyncio.ensure_future(it.reconciler.round())
                await settle()
                deleting = asyncio.gather(it.delete("a"), it.delete("b"))
                await settle()
                goes_on.set()
                await deleting
                await reconciling
                for link in it.node.json("link", "show", "type", "veth"):
                    assert "UP" not in link["flags"]
                    assert "master" not in link

    play(story)


def test_a_wire_that_goes_between_two_looks_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A namespace is deleted by the kernel in its own time: the index was found, the link is not any more."""

    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                host = (await it.add("a", a.path))["interfaces"][0]["name"]
                index = int(it.node.json("link", "show", "dev", host)[0]["ifindex"])
                it.node.ip("link", "del", host)
                monkeypatch.setattr("ipam_daemon.wires.index_of", lambda name: index if name == host else 0)
                await it.reconciler.round()
                await it.reconciler.round()
                monkeypatch.undo()
                assert it.journal.attachments() == ()

    play(story)


def test_what_others_have_on_the_node_is_not_touched(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            it.node.ip("link", "add", "foreign0", "type", "bridge")
            it.node.ip("link", "add", "foreign1", "type", "veth", "peer", "name", "foreign2")
            it.node.ip("link", "set", "foreign1", "master", "pw0", "up", "alias", "somebody else's")
            it.node.ip("route", "add", "198.51.100.0/24", "dev", "pw0")
            it.node.run("nft", "-f", "-", stdin="table inet foreign { chain c { counter; }; }")
            before = foreign_state(it.node)
            with pods(1) as (a,):
                await it.add("a", a.path)
                await it.reconciler.round()
                await it.delete("a")
                await it.reap()
                again = await it.restarted().start()
                assert await it.node.thread.run(again.wires.found, 0.0) == ()
                await again.reconciler.round()
                again.journal.close()
            assert foreign_state(it.node) == before

    play(story)


def foreign_state(node: Node) -> object:
    """What others have there. Whether a link has a carrier follows the pods by and by, and is not theirs."""
    carrier = {"NO-CARRIER", "LOWER_UP"}
    links = [(each["ifname"], each.get("master"), {*each["flags"]} - carrier) for each in node.json("link", "show")]
    routes = node.ip("route").replace(" linkdown", "")
    return sorted(links, key=lambda link: link[0]), routes, node.run("nft", "list", "ruleset")
