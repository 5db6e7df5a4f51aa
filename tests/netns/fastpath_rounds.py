"""A node with pods and without a daemon, on which a test asks for the fast path's rounds, one at a time."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ipam_daemon import fastpath, tc_program
from ipam_daemon.cni import NetworkConfig
from ipam_daemon.fastpath import FastPath, read_conntrack
from ipam_daemon.fastpath_program import Where
from ipam_daemon.model import Attachment
from ipam_daemon.netlink import index_of
from ipam_daemon.plan import FirewallPlan, NodePlan
from podwire.bpf import tcx
from tests.netns.busy_flows import inside
from tests.netns.node_fixtures import Engine, Netns, bridge_plan, call, engine
from tests.netns.node_fixtures import pods as namespaces
from tests.netns.test_devices import VXLAN

CIDR = ipaddress.ip_network("10.244.1.0/26")
NONE = frozenset[Any]()
PLAN = NodePlan(
    bridge=msgspec.structs.replace(bridge_plan(CIDR), pools=(CIDR,)),
    vxlan=VXLAN,
    peers=None,
    firewall=FirewallPlan(local_blocks=frozenset((CIDR,)), unmasqueraded=NONE, vteps=None, vxlan_port=4789),
)
TRACKING = "table inet tracking { chain every { type filter hook forward priority 0; ct state established accept; }; }"


class Place:
    """A node with pods and without a daemon, whose rounds are asked for."""

    def __init__(self, of: Engine, spaces: list[Netns]) -> None:
        self.engine, self.node, self.spaces = of, of.node, spaces
        self.path: FastPath
        self.plan = PLAN
        self.ports: list[str] = []
        self.addresses: list[str] = []

    async def begin(self) -> None:
        """As a daemon does that starts."""
        await self.run(fastpath.end, self.node.thread)
        self.path = await self.run(FastPath, self.node.thread, *read_conntrack())

    async def end(self) -> None:
        """As one that ends."""
        await self.run(self.path.close)

    async def run(self, what: Callable[..., Any], *of: object) -> Any:
        """On the netlink thread."""
        return await self.node.thread.run(what, *of)

    async def add(self, *lasts: bool) -> None:
        """A pod for each."""
        for last in lasts:
            space = self.spaces[len(self.ports)]
            config = NetworkConfig(name="podnet", cni_version="1.1.0", last=last)
            made = json.loads(await self.engine.attachments.add(call("ADD", space.name, space.path, config=config)))
            self.ports.append(next(each["name"] for each in made["interfaces"] if "sandbox" not in each))
            self.addresses.append(made["ips"][0]["address"].split("/")[0])

    async def round(self, *young: str) -> bool:
        """One, with these wires young; whether it was through."""
        return bool(await self.run(self.path.ensure, self.plan, self.wires(), frozenset(young)))

    async def rounds(self) -> None:
        """Until all is done."""
        done = await self.round()
        while not done:
            done = await self.run(self.path.go_on)

    def wires(self) -> Sequence[Attachment]:
        return self.engine.journal.attachments()

    async def at(self, port: str) -> tuple[list[str], list[str], bool]:
        """What runs there: filters, programs of TCX, and whether there is a place for filters."""

        def look() -> tuple[list[str], list[str], bool]:
            index = index_of(port)
            channel = self.node.thread.channel
            shown = [each for asked in tc_program.list_filters(index) for each in channel.dump(asked)]
            names = [each for each in map(tc_program.read_filter_name, shown) if each is not None]
            found = {tc_program.read_qdisc(each) for each in channel.dump(tc_program.list_qdiscs())}
            beside = [each for way in tcx.Way for each in tcx.programs(index, way).values()]
            return names, beside, tc_program.Qdisc(index, "clsact") in found

        return await self.run(look)  # type: ignore[no-any-return]

    async def strangers_at(self, port: str) -> list[str]:
        """Names of what runs there and is not ours."""
        filters, beside, _ = await self.at(port)
        return [each for each in filters + beside if each not in (FROM_POD, ARRIVING)]

    def talk(self, here: int, there: int, protocol: str = "udp") -> Talk:
        """A connection between two pods."""
        return Talk(self.spaces[here], self.spaces[there], self.addresses[there], protocol)

    async def fast(self, talk: Talk) -> int:
        """How many packets are fast while twenty are exchanged."""
        before = sum((await self.run(self.path.taken)).values())
        talk.exchange(10)
        return int(sum((await self.run(self.path.taken)).values()) - before)


class Talk:
    """A connection of UDP or TCP, answered once. Its ends may change places."""

    def __init__(self, here: Netns, there: Netns, at: str, protocol: str) -> None:
        self.protocol, kind = protocol, {"udp": socket.SOCK_DGRAM, "tcp": socket.SOCK_STREAM}[protocol]
        made = (inside(each.path, lambda: socket.socket(type=kind)) for each in (here, there))
        self.client, self.server = made
        self.server.bind((at, 0))
        if protocol == "tcp":
            with self.server as listening:
                listening.listen()
                self.client.connect(listening.getsockname())
                self.server, _ = listening.accept()
        else:
            self.client.connect(self.server.getsockname())
            self.client.send(b"?")
            self.server.connect(self.server.recvfrom(16)[1])
        for each in (self.client, self.server):
            each.settimeout(30)
        self.exchange(1)

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.close()

    def exchange(self, times: int) -> None:
        """Something there, and something back."""
        for _ in range(times):
            for one, other in ((self.client, self.server), (self.server, self.client)):
                one.send(b"?")
                assert other.recv(16) == b"?"


FROM_POD, ARRIVING = (each.value for each in Where)
Running = tuple[list[str], list[str], bool]
FILTER: Running = ([FROM_POD], [], True)
BY_TCX: Running = ([], [FROM_POD], False)
"""What runs at the port of a pod that nothing follows, and at that of any other."""


@contextlib.asynccontextmanager
async def place(folder: Path, *lasts: bool) -> AsyncIterator[Place]:
    """A node with these pods, on which a daemon has begun."""
    with namespaces(len(lasts)) as spaces:
        async with engine(folder, str(CIDR)) as made:
            made.wires._filtered = True
            made.node.run("nft", "-f", "-", stdin=TRACKING)
            its = Place(made, spaces)
            await its.begin()
            try:
                await its.add(*lasts)
                yield its
            finally:
                await its.end()
