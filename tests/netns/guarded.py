"""A node with two guarded pods and another machine on its underlay, and frames that one of the pods may send.

A pod (10.244.1.3) sends raw frames to a pod beside it (10.244.1.4), to the node (10.244.1.1), and by way of the node to
another machine (192.0.2.2).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import msgspec

from ipam_daemon.devices import Devices
from ipam_daemon.guard import SpoofGuard
from ipam_daemon.model import Attachment
from ipam_daemon.plan import gateways, mac_of, plan_attachment
from ipam_daemon.spoofguard import link_local
from ipam_daemon.wires import Wires
from tests.netns import frames
from tests.netns.frames import Raw, ethernet, raw, udp
from tests.netns.node_fixtures import Netns, Node, block, bridge_plan, call

CIDR, SIX = ipaddress.ip_network("10.244.1.0/24"), ipaddress.ip_network("fd00:1::/120")
GATEWAYS = gateways([block(CIDR), block(SIX)])
ME, NEIGHBOUR, NODE = "10.244.1.3", "10.244.1.4", "10.244.1.1"
ME6, NEIGHBOUR6, NODE6 = "fd00:1::3", "fd00:1::4", "fd00:1::1"
MY_MAC, ITS_MAC, NODE_MAC = (mac_of(ipaddress.ip_address(each)) for each in (ME, NEIGHBOUR, NODE))
MY_LOCAL, ITS_LOCAL = str(link_local(MY_MAC)), str(link_local(ITS_MAC))
OUTSIDE, STRANGER, NOBODY = "192.0.2.2", "198.51.100.1", "02:00:00:00:00:99"
ALL_NODES, ALL_NODES_MAC = "ff02::1", "33:33:00:00:00:01"
TOKEN, LAST = b"spoofed-or-not", b"and-that-was-all"


class Stage:
    """A node with two pods, guarded, and another machine on its underlay."""

    def __init__(self, node: Node, a: Netns, b: Netns, outside: Netns) -> None:
        self.node, self.a, self.b, self.outside = node, a, b, outside
        self.guard = SpoofGuard(node.thread)
        self.wires = Wires(node.thread, guard=self.guard)
        self.first = attachment(a, 3)
        self.second = attachment(b, 4)

    async def attach(self, *attachments: Attachment) -> None:
        for each in attachments:
            await self.node.thread.run(self.wires.attach, each, GATEWAYS)

    async def ensure(self) -> list[str]:
        return await self.node.thread.run(self.wires.ensure_guard)

    async def dropped(self) -> dict[str, int]:
        """What was counted since the table was made, by reason; what was not is left out."""
        return {
            reason: packets for reason, packets in (await self.node.thread.run(self.guard.dropped)).items() if packets
        }

    def listed(self) -> str:
        """Our table as nft lists it, without what was counted and learnt."""
        return without_learnt(self.node.run("nft", "-s", "list", "table", "bridge", "podwire"))

    def port_of(self, mac: str) -> str:
        """Where the bridge believes a MAC to be."""
        lines = self.node.run("bridge", "fdb", "show", "br", "pw0").splitlines()
        return next((line.split()[2] for line in lines if line.startswith(mac) and "permanent" not in line), "")


def without_learnt(table: str) -> str:
    """The guard's table without the set that its rules fill, whose elements end by themselves."""
    return re.sub(r"set routers {.*?\n\t}", "", table, flags=re.DOTALL)


def attachment(pod: Netns, number: int, mac: str = "") -> Attachment:
    addresses = tuple(
        ipaddress.ip_interface(f"{text}{number}/{length}") for text, length in (("10.244.1.", 24), ("fd00:1::", 120))
    )
    made = plan_attachment(call("ADD", f"c{number}", pod.path, issued_ns=number), addresses, 1400, 1.0)
    return msgspec.structs.replace(made, mac=mac or made.mac)


@asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    """Pods are not attached yet, and there is no table."""
    async with Node() as node:
        plan = bridge_plan(CIDR)
        plan = msgspec.structs.replace(plan, addresses=(*plan.addresses, ipaddress.ip_interface(f"{NODE6}/120")))
        await node.thread.run(Devices(node.thread).ensure_bridge, plan)
        with ExitStack() as stack:
            a, b, outside = (stack.enter_context(Netns(name)) for name in ("a", "b", "outside"))
            node.ip("link", "add", "under0", "type", "veth", "peer", "name", "under0", "netns", outside.name)
            for machine, address in ((node, "192.0.2.1/24"), (outside, f"{OUTSIDE}/24")):
                machine.ip("addr", "add", address, "dev", "under0")
                machine.ip("link", "set", "under0", "up")
            yield Stage(node, a, b, outside)


@asynccontextmanager
async def guarded() -> AsyncIterator[tuple[Stage, Raw, Raw]]:
    """Both pods attached and guarded, a raw socket in the first and an ear in the second."""
    async with stage() as it:
        await it.ensure()
        await it.attach(it.first, it.second)
        mouth, ear = await raw(it.a.path), await raw(it.b.path)
        try:
            yield it, mouth, ear
        finally:
            mouth.close()
            ear.close()


def to_pod(payload: bytes, kind: int = frames.IPV4, source: str = MY_MAC, target: str = ITS_MAC) -> bytes:
    return ethernet(source, target, kind, payload)


def six(payload: bytes, source: str = MY_MAC, target: str = ALL_NODES_MAC) -> bytes:
    return ethernet(source, target, frames.IPV6, payload)


HONEST = to_pod(udp(ME, NEIGHBOUR, LAST))
