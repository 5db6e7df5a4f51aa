"""Another version of the daemon on the same journal and the same kernel, while pods run.

The version before knew no spoof guard, no ports of the node and no limits: its rows have no such fields, its journal no
such table, its kernel no table of ours on the bridge.
"""

from __future__ import annotations

import asyncio
import ipaddress
import sqlite3
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ipam_daemon.cni import NetworkConfig
from ipam_daemon.errors import CheckFailed
from ipam_daemon.guard import SpoofGuard
from tests.netns.node_fixtures import Engine, Netns, Node, call, key, play
from tests.netns.traffic import traffic

CIDR = ipaddress.ip_network("10.244.1.0/28")
NEW_FIELDS = ("port_mappings", "bandwidth")


def as_before(journal: Path) -> None:
    """Makes it what the version before has written."""
    with closing(sqlite3.connect(journal, isolation_level=None)) as db:
        for network, container, ifname, body in db.execute("SELECT * FROM attachment").fetchall():
            plain = msgspec.json.decode(body)
            for field in NEW_FIELDS:
                del plain[field]
            db.execute(
                "UPDATE attachment SET body = ? WHERE network = ? AND container_id = ? AND ifname = ?",
                (msgspec.json.encode(plain), network, container, ifname),
            )
        db.execute("DROP TABLE host_port")


def with_result(result: dict[str, Any]) -> NetworkConfig:
    plain = {"name": "podnet", "cniVersion": "1.1.0", "prevResult": result}
    return msgspec.convert(plain, NetworkConfig)


async def upgraded(former: Engine) -> Engine:
    """A daemon of today after the one before was ended, started as Agent.restore and its first convergence do."""
    former.journal.close()
    as_before(former.folder / "journal.db")
    it = Engine(former.node, former.folder, CIDR, guard=SpoofGuard(former.node.thread))
    await it.start()
    await it.node.thread.run(it.wires.adopt, it.journal.attachments())
    assert await it.node.thread.run(it.wires.ensure_guard) == ["made table bridge podwire"]
    return it


def test_pods_of_the_version_before_run_on_and_are_guarded(tmp_path: Path) -> None:
    async def story() -> None:
        async with Node() as node:
            former = await Engine(node, tmp_path, CIDR).start()
            with ExitStack() as stack:
                a, b, late = (stack.enter_context(Netns(name)) for name in ("a", "b", "late"))
                results = {each: await former.add(each, pod.path) for each, pod in (("a", a), ("b", b))}
                paths = {"a": a.path, "b": b.path}
                address = results["b"]["ips"][0]["address"].split("/")[0]
                with traffic(a, b, address) as running:
                    it = await upgraded(former)
                    await it.reconciler.round()
                    await it.add("late", late.path)
                    assert late.pings(address)
                    await asyncio.sleep(0.2)  # for packets enough to tell
                    assert running.harm() == []
                assert it.metrics.recent == former.metrics.recent, "nothing had to be mended"
                for name, result in results.items():
                    await it.attachments.check(call("CHECK", name, paths[name], config=with_result(result)))
                await it.delete("a")
                assert not a.pings(address, 1)
                await it.reap()
                assert [row.key for row in it.journal.attachments()] == [key("b"), key("late")]
                it.journal.close()

    play(story)


def test_check_says_when_a_pod_may_not_send_as_itself(tmp_path: Path) -> None:
    async def story() -> None:
        async with Node() as node:
            it = await Engine(node, tmp_path, CIDR, guard=SpoofGuard(node.thread)).start()
            with Netns("a") as a:
                result = await it.add("a", a.path)
                asked = call("CHECK", "a", a.path, config=with_result(result))
                await it.attachments.check(asked)
                node.run("nft", "flush", "set", "bridge", "podwire", "bound4")
                with pytest.raises(CheckFailed, match="may not send as what it has been given"):
                    await it.attachments.check(asked)
                await node.thread.run(it.wires.ensure_guard)
                await it.attachments.check(asked)
                await it.delete("a")
                it.journal.close()

    play(story)
